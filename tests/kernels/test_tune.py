"""Launch settings are measured, written, read and looked up; here with invented times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich")
from llmos_kernels._core import tuned
from llmos_kernels._tools import build_pack, tune, tune_jobs
from llmos_kernels._tools.tune_jobs import TuningJob
from llmos_kernels._triton import rows
from llmos_kernels._triton.attention import tiles
from llmos_kernels._triton.gemm import gemm, persistent
from llmos_kernels._triton.norm import layer_norm
from llmos_kernels._triton.runtime import settings

ROOT = Path(__file__).parents[2]
ABOUT = {"gpu": "Test GPU", "arch": "sm_90", "torch": "2", "triton": "3"}
BF16 = torch.bfloat16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty folder for settings, used instead of the package's."""
    monkeypatch.setenv("LLMOS_TUNED", str(tmp_path))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "package")
    forget()
    yield tmp_path
    forget()


def forget():
    for cached in (settings.tables, settings._nearest):
        cached.cache_clear()


def entry(shape, dtype="bfloat16", **settings):
    return {"dtype": dtype, "shape": shape, "settings": settings, "us": 1.0, "rule_us": 2.0}


def product(warps):
    return {
        "persistent": 0,
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "BLOCK_K": 32,
        "num_warps": warps,
        "num_stages": 3,
    }


def put(path, **settings):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": 1, **ABOUT, "settings": settings}))
    forget()


def found(kind, shape, dtype=BF16, arch="sm_90"):
    with build_pack.planned_for(arch):
        return settings.settings(kind, torch.empty(1, dtype=dtype), shape)


def test_nearest(folder):
    put(
        folder / "gpu.json",
        linear=[
            entry([1024, 1024, 1024], **product(1)),
            entry([1024, 4096, 1024], **product(2)),
            entry([1024, 1024, 1024], "float16", **product(4)),
            entry([8192, 1024, 1024]) | {"settings": None},
        ],
        **{"attention forward": [entry([64], BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)]},
    )
    assert found("linear", (1000, 1500, 1024)) == product(1)
    assert found("linear", (1000, 2100, 1024)) == product(2)
    assert found("linear", (1000, 2100, 1024), torch.float16) == product(4)
    assert found("linear", (256, 1024, 1024)) is None, "a factor of 4"
    assert found("linear", (257, 1024, 1024)) == product(1)
    assert found("linear", (4096, 1024, 1024)) is None, "the rule was as fast"
    assert found("attention forward", (64,)) and found("attention forward", (128,)) is None
    assert found("linear", (1024, 1024, 1024), torch.float32) is None
    assert found("int8", (1024, 1024, 1024)) is None
    assert found("linear", (1024, 1024, 1024), arch="sm_80") is None
    assert settings.settings("linear", torch.empty(1, dtype=BF16), (1024, 1024, 1024)) is None


def test_name_before_architecture(folder):
    row = lambda warps: entry([64], ROWS=1, num_warps=warps)
    put(folder / "a.json", layer_norm=[row(1)])
    put(folder / "package" / "b.json", layer_norm=[row(2)], int8_norm=[row(4)])
    table = json.loads((folder / "package" / "b.json").read_text())
    (folder / "package" / "b.json").write_text(json.dumps(table | {"gpu": "Other GPU"}))
    forget()
    of = lambda name, kind="layer_norm": settings._nearest(name, "sm_90", kind, "bfloat16", (64,))
    assert of("Test GPU")["num_warps"] == 1 and of("Other GPU")["num_warps"] == 2
    assert of("Unknown GPU")["num_warps"] == of(None)["num_warps"] == 1, (
        "the user's table comes first"
    )
    assert of("Test GPU", "int8_norm")["num_warps"] == 4, "the first has none"


BAD = {
    "not JSON": ("{", "JSONDecodeError"),
    "format": ('{"format": 2}', "has format 2, expected 1"),
    "missing": ('{"format": 1}', "KeyError: 'settings'"),
    "unknown": (entry([64], BLOCK_Q=1), "settings {'BLOCK_Q': 1}"),
    "incomplete": (entry([64], num_warps=1), "settings {'num_warps': 1}"),
    "not whole": (entry([64], ROWS=1, num_warps=1.5), "'num_warps': 1.5}"),
    "no power of 2": (entry([64], ROWS=3, num_warps=1), "ROWS 3"),
    "too many": (entry([64], ROWS=1, num_warps=64), "num_warps 64"),
    "shape": (entry([0], ROWS=1, num_warps=1), "shape [0]"),
    "sizes": (entry([64, 64], ROWS=1, num_warps=1), "shape [64, 64]"),
    "dtype": (entry([64], "bf16x", ROWS=1, num_warps=1), "dtype bf16x"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(folder, kind):
    """A bad file causes one warning that names it, and the launch rules are used."""
    content, words = BAD[kind]
    if isinstance(content, str):
        (folder / "bad.json").write_text(content)
    else:
        put(folder / "bad.json", layer_norm=[content])
    with pytest.warns(RuntimeWarning) as caught:
        assert found("layer_norm", (64,)) is None
    (warning,) = caught
    assert "bad.json: " in str(warning.message) and words in str(warning.message)
    assert found("layer_norm", (64,)) is None


def test_launchers_ask(folder):
    """Every launcher prefers tuned settings to its own rule."""
    row = {"ROWS": 1, "num_warps": 2}
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    blocks = tile | {"BLOCK_K": 32}
    put(
        folder / "gpu.json",
        layer_norm=[entry([768], **row)],
        **{"attention forward": [entry([64], **tile)], "int8": [entry([256, 512, 512], **blocks)]},
        linear=[
            entry([256, 512, 512], **blocks, persistent=0),
            entry([4096, 1024, 1024], **blocks, persistent=1),
        ],
    )
    empty = lambda *shape: torch.empty(shape, dtype=BF16)
    with build_pack.planned_for("sm_90"):
        assert rows.row_block("layer_norm", empty(1), 700) == (1, 1024, 2)
        assert rows.row_block("layer_norm backward", empty(1), 700) != (1, 1024, 2)
        assert tiles.tile_arguments("forward", empty(1, 1, 1, 40), 64) == tile
        small, weight = empty(256, 512), empty(512, 512)
        assert persistent.plan("linear", small, weight, True) is None
        grid, blocks = gemm.plan("linear", small, 256, 512, 512, False)
        assert grid == (4 * 16,) and blocks["BLOCK_K"] == 32 and blocks["maxnreg"] is None
        large, weight = empty(4096, 1024), empty(1024, 1024)
        _, blocks = persistent.plan("linear", large, weight, True)
        assert blocks["BLOCK_K"] == 32 and blocks["num_warps"] == 4
        # Where the kernel cannot be persistent the rule's tile is used: the tuned one may not fit.
        assert gemm.plan("linear", large, 4096, 1024, 1024, False)[1]["BLOCK_K"] == 64


def tiny(empty, dtype):
    """Yield one launch of a small norm."""

    def make():
        return empty(6, 64), None, None, 64, 1e-5, True

    yield TuningJob("layer_norm", dtype, (64,), layer_norm.forward, make, tune_jobs.ROWS[:4])


def test_tune(folder, monkeypatch):
    """The fastest correct setting is written if it beats the rule; earlier results are kept."""
    monkeypatch.setitem(tune_jobs.OPS, "tiny", tiny)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path, asked = folder / "Test_GPU.json", []

    def run(*times, dtypes=(BF16,)):
        given = iter(times)

        def seconds(launcher, args):
            launcher(*args)
            taken = next(given)
            if taken is None:
                raise KeyboardInterrupt
            asked.append(taken)
            return taken

        done = tune.run(["tiny"], dtypes, path, ABOUT, device, seconds)
        return done, settings.read(path)["settings"]["layer_norm"]

    done, (best,) = run(10e-6, 9e-6, 7e-6, 8e-6, 11e-6)
    assert done and len(asked) == 5
    assert best == {
        "dtype": "bfloat16",
        "shape": [64],
        "settings": tune_jobs.ROWS[1],
        "us": 7.0,
        "rule_us": 10.0,
    }
    forget()
    assert found("layer_norm", (64,)) == tune_jobs.ROWS[1]
    # The rule itself is timed, although a tuned setting exists.
    assert settings.settings("layer_norm", torch.empty(1, dtype=BF16), (64,)) is None
    # Within noise of the rule null is written, and the entry of the other dtype is kept.
    done, kept = run(10e-6, 9.9e-6, 9.8e-6, 10e-6, 10e-6, dtypes=(torch.float32,))
    assert done and kept[0] == best
    assert kept[1]["settings"] is None and kept[1]["us"] == kept[1]["rule_us"] == 10.0
    done, same = run(10e-6, 9e-6, None, dtypes=(torch.float32,))
    assert not done and same == kept
    done, again = run(*[1e-6] * 5)
    assert [e["settings"] for e in again] == [None, None], "measured again"
    # A setting with a wrong result is not timed.
    monkeypatch.setattr(tune, "_agree", lambda *_: False)
    asked.clear()
    run(1e-6)
    assert len(asked) == 1


def test_agree():
    ones = torch.ones(8)
    assert tune._agree([ones + 1e-7], [ones], torch.float32)
    assert not tune._agree([ones + 1e-5], [ones], torch.float32)
    assert not tune._agree([ones / 0], [ones], torch.float32)
    assert tune._agree([ones / 0], [ones / 0], torch.float32)


@pytest.mark.parametrize("op", tune_jobs.OPS)
def test_what_is_tuned(op):
    """Every job has a known kind and candidates that are valid for it."""
    listed = list(tune_jobs.OPS[op](lambda *shape: torch.empty(shape, dtype=BF16), BF16))
    assert len(listed) >= 10
    for job in listed:
        assert len(job.candidates) > 5
        for candidate in job.candidates:
            settings._check(job.kind, entry(list(job.shape), **candidate))


AHEAD = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, "benchmarks")
import launch_cost
from llmos_kernels._core import tuned
from llmos_kernels._tools import build_pack, tune_jobs, tune_precompile
from llmos_kernels._triton.runtime import settings
launch_cost.fake_driver()
tune_jobs.ROWS[:] = tune_jobs.ROWS[::9]
tune_jobs.pack_shapes.WIDTHS = (256, 2048)
made = lambda: {p.parent.name for p in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")}
counts = []
for part in range(3):
    assert tune_precompile.compile_part("layer_norm", torch.bfloat16, "sm_90", part, 3) == 0
    counts.append(len(made()))
with build_pack.recorded_launches("sm_90") as launches:
    empty = lambda *shape: torch.empty(shape, dtype=torch.bfloat16)
    for job in tune_jobs.OPS["layer_norm"](empty, torch.bfloat16):
        args = job.make()
        for candidate in (None, *job.candidates):
            with settings.override(job.kind, candidate):
                job.launcher(*args)
assert 0 < counts[0] < counts[1] < counts[2] == len(set(launches)), (counts, len(set(launches)))
assert tune_precompile.compile_part("layer_norm", torch.bfloat16, "sm_90", 0, 1) == 0
assert len(made()) == counts[2], "compiled again"
def fails(self, *args, **kwargs):
    raise RuntimeError("too large")
tune_precompile.Kernel.run = fails
assert tune_precompile.compile_part("layer_norm", torch.bfloat16, "sm_90", 0, 1) == counts[2]
"""


def test_compiled_ahead(tmp_path):
    """Each launch is compiled by one process, into Triton's cache; a failure stops no other."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", AHEAD]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
