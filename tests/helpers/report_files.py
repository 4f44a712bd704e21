"""Files of benchmark results for tests of the report. All times are made up."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

from report import model
from report import page as pages
from report import plots as figures

HOSTILE = '<script>document.title="owned"</script> $x_{$ "\' ]]> --> \ud800 \x00 漢'


def benchmark(name, provider, micros, op=None, dtype="float32", direction="forward", **info):
    """An entry with all keys that ours have, if an op is given."""
    stats = {"median": micros / 1e6}
    full = {
        "op": op,
        "size": [8, 64],
        "dtype": dtype,
        "direction": direction,
        "error_over_budget": 0.4,
        "bytes": 1_000_000,
        "median_ci": [micros * 0.98 / 1e6, micros * 1.02 / 1e6],
        "share": 0.5,
        "peak_bytes": 1 << 20,
    }
    return {
        "group": name,
        "name": f"test[{provider}]",
        "fullname": f"bench.py::test[{provider}]",
        "params": {"provider": provider},
        "stats": stats,
        "extra_info": (full if op else {}) | info,
    }


NORM, GELU, INT8 = (
    "layer_norm [8, 64] float32 forward",
    "gelu [9] bfloat16 backward",
    "int8 linear [1] bfloat16 forward + backward",
)
GOAL = {"eager": 2.0, "liger": 1.0}
BENCHMARKS = [
    benchmark(NORM, "kernel", 10, "layer_norm", goal=GOAL, vs_eager_ci=[2.4, 2.6]),
    benchmark(NORM, "eager", 25, "layer_norm"),
    benchmark(NORM, "compile", 8, "layer_norm"),
    benchmark(GELU, "kernel", 20, "gelu", "bfloat16", "backward", goal={"eager": 1.5}, FLOP=4e8),
    benchmark(GELU, "eager", 5, "gelu", "bfloat16", "backward", runs="a_kernel"),
    benchmark(INT8, "kernel", 30, relative_error=0.011),
    benchmark(INT8, "dynamic", 29.999),
]
LLMOS = {
    "machine": "test-machine",
    "torch": "2.13.0",
    "threads": 2,
    "settings": {"OMP_NUM_THREADS": "2"},
    "limits": {"copy": 45.1, "float32": 480.0, "bfloat16": 900.0},
    "state": {"load": 0.1},
    "versions": {"torch": "2.13.0"},
}


def made(benchmarks=BENCHMARKS, machine="test-machine", wrong=(), absent=None):
    content = {
        "machine_info": {"node": "node", "llmos": LLMOS | {"machine": machine}},
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "benchmarks": list(benchmarks),
        "datetime": "2026-01-02T03:04:05",
        "version": "5",
        "llmos": {"wrong": list(wrong), "absent": absent or {}},
    }
    return copy.deepcopy(content)


def reporter(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes files and the page of them, and plots to a folder.

    It returns the page's text.
    """

    def run(*contents, plots=None):
        paths = []
        for i, content in enumerate(contents):
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
        page = tmp_path / "out" / "page.html"
        page.parent.mkdir(exist_ok=True)
        results = model.read(paths)
        page.write_text(pages.render(results), encoding="utf-8", newline="\n")
        if plots is not None:
            plots.mkdir(exist_ok=True)
            figures.save(results, plots)
        return page.read_text(encoding="utf-8")

    return run


def hostile():
    entries = [
        benchmark(HOSTILE, provider, 1 + i, HOSTILE, HOSTILE, HOSTILE, runs=HOSTILE, FLOP=10**i)
        for i, provider in enumerate(("kernel", "eager", HOSTILE, "_hidden"))
    ]
    entries[0]["extra_info"]["goal"] = {HOSTILE: 2}
    wrong = {"group": HOSTILE + "2", "provider": HOSTILE, "why": HOSTILE}
    content = made(entries, HOSTILE, [wrong], {HOSTILE: HOSTILE})
    content["machine_info"]["llmos"]["limits"][HOSTILE] = 3.0
    return content | {"datetime": HOSTILE, "commit_info": {"id": HOSTILE}}
