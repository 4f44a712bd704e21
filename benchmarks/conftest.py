"""Side by side: each round times every provider in turn; ``extra_info`` has medians and ratios.

``make bench`` pins the threads. ``--save`` writes the table to ``results/<machine>/ops.json``. Nothing is
timed while other processes are at work, but with ``--busy``.
"""

import json
import os
import platform
import re
from pathlib import Path

import machine
import pytest
import rates
import torch

from llmos_kernels import _environment
from llmos_kernels.testing import interleaved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = []


def pytest_addoption(parser):
    parser.addoption("--save", metavar="FOLDER", nargs="?", const="", help="write results as JSON")
    parser.addoption("--busy", action="store_true", help="measure though other processes run")


def machine_name() -> str:
    """The GPU's name, or the CPU's, as a folder name."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else _environment._cpu_name()
    return re.sub(
        r"\W+", "-", f"{name} {torch.get_num_threads()} threads" if DEVICE == "cpu" else name
    ).lower()


@pytest.fixture
def compare(benchmark, request):
    """Time providers in turn, the first of them ours, given the bytes that one call must move and the
    operations that it must do."""

    def run(name, providers, *, moved, goal=None, rounds=25, flop=None, dtype=None, **more):
        if not request.config.getoption("busy"):
            why = machine.wait_until_idle(DEVICE)
            if why is not None:
                pytest.fail(f"not measured: {why} (--busy measures all the same)", pytrace=False)
        times = dict(zip(providers, interleaved(list(providers.values()), rounds), strict=True))
        ours, *_ = times
        row = {f"{k}_us": round(t * 1e6, 2) for k, t in times.items()}
        row |= {f"vs_{k}": round(t / times[ours], 2) for k, t in times.items() if k != ours}
        row |= {
            "bytes": moved,
            **rates.share_of_limits(DEVICE, times[ours], moved, flop, dtype),
            "goal": goal,
        }
        row |= {k: v for k, v in more.items() if v is not None}
        benchmark.extra_info.update(row)
        ROWS.append({"benchmark": name, **row})
        calls = max(1, round(2e-3 / times[ours]))
        benchmark.pedantic(providers[ours], rounds=10, iterations=calls)

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write(
        f"{'median us':58} {'kernel':>9} {'eager':>9} {'compile':>9} {'vs eager':>8} {'goal':>6} {'GB/s':>7} {'share':>6}"
    )
    for row in ROWS:
        cells = [
            row.get(k)
            for k in ("kernel_us", "eager_us", "compile_us", "vs_eager", "goal", "GB/s", "share")
        ]
        texts = ["" if c is None else str(c) for c in cells]
        write(
            f"{row['benchmark']:58} "
            + " ".join(t.rjust(w) for t, w in zip(texts, (9, 9, 9, 8, 6, 7, 6), strict=True))
        )
    folder = config.getoption("save")
    if folder is not None:
        target = Path(folder) if folder else Path(__file__).parent / "results" / machine_name()
        target.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MALLOC_"))}
        about = {
            "machine": machine_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        about |= {"threads": torch.get_num_threads(), "settings": settings}
        about |= {"limits": rates.limits(DEVICE), "state": machine.state(DEVICE)}
        path, rows = target / "ops.json", {row["benchmark"]: row for row in ROWS}
        if path.exists():  # What did not run this time stays.
            rows = {r["benchmark"]: r for r in json.loads(path.read_text())["rows"]} | rows
        path.write_text(json.dumps({"about": about, "rows": [*rows.values()]}, indent=1) + "\n")
        write(f"written to {target / 'ops.json'}")
