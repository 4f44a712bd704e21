"""The harness: who is asked, who has no time, what is kept, what a page is made of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import baseline
import gate
import machine
import peers
import pytest
import rows
import saved_rows
import torch
import torch.nn.functional as F
from report import model

from llmos_kernels._tools import bench as runner
from llmos_kernels.testing import samples

pytest.importorskip("pytest_benchmark")


def made_row(**calls):
    row = rows.Row("op", (2, 3), torch.float32, "forward", 1 << 20, goals={"eager": 2.0})
    for provider, build in calls.items():
        row.add(provider, build)
    return row


def answer(error, value=1.0):
    return lambda: rows.Call(lambda: value, (), {"error_over_budget": error})


def fails():
    raise NotImplementedError("not for this\nsize")


def test_a_wrong_row_has_no_time():
    row = made_row(kernel=answer(0.9), eager=answer(0.5), other=answer(4.1), close=answer(3.9))
    assert row.name == "op [2, 3] float32 forward" and list(row.calls) == [
        "kernel",
        "eager",
        "close",
    ]
    assert row.wrong == {"other": "error 4.1 times its budget"}
    row = made_row(kernel=answer(1.1), eager=fails, mute=lambda: None)
    assert not row.calls and row.wrong == {
        "kernel": "error 1.1 times its budget",
        "eager": "NotImplementedError: not for this",
    }
    with pytest.raises(NotImplementedError):
        made_row(kernel=fails)
    int8 = rows.Call(lambda: 0, (), rows.relative(torch.ones(4), torch.ones(4).double() * 1.1))
    assert int8.wrong == "relative error 0.0909"


def test_measured(monkeypatch):
    """Each provider's samples, ratios by round, the error; nothing where others were at work."""
    taken = {"kernel": [1.0, 2.0, 3.0], "eager": [2.0, 5.0, 6.0]}
    monkeypatch.setattr(rows, "times", lambda *_: (taken, {}))
    monkeypatch.setattr(rows.rates, "share_of_limits", lambda *_: {"GB/s": 1.0, "share": 0.5})
    monkeypatch.setattr(rows.machine.Watch, "disturbed_on", lambda *_: None)
    row = made_row(kernel=answer(0.9), eager=answer(0.5), odd=fails)
    found = rows.measure(row, 3, 1.0, busy=False)
    kernel = found["kernel"]["extra"]
    assert kernel["vs_eager"] == 2.0 and kernel["vs_eager_ci"] == [2.0, 2.5] and kernel["us"] == 2e6
    assert kernel["goal"] == {"eager": 2.0} and kernel["error_over_budget"] == 0.9
    assert "ours" not in kernel
    assert found["eager"]["samples"] == taken["eager"] and "goal" not in found["eager"]["extra"]
    assert found["odd"]["wrong"].startswith("NotImplementedError")
    monkeypatch.setattr(rows.machine.Watch, "disturbed_on", lambda *_: "others")
    monkeypatch.setattr(rows.machine, "wait_until_idle", lambda *_: None)
    with pytest.raises(rows.machine.Busy, match=r"not measured: others \(--busy"):
        rows.measure(row, 3, 1.0, busy=False)
    assert rows.measure(row, 3, 1.0, busy=True).keys() == found.keys()


def test_peak_bytes():
    x = torch.ones(1 << 18)
    hidden = lambda: ((x + 1) * 2).sum()
    assert 2 << 20 <= rows.peak_bytes(hidden) < 3 << 20


def test_samples():
    order = []
    fns = [lambda: order.append("a"), lambda: order.append("b")]
    found = samples(fns, rounds=4, seconds=0.0)
    assert [len(t) for t in found] == [4, 4]
    assert order == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 4, "in turn, after both are warm"
    assert len(samples(fns, rounds=40, seconds=0.0, max_seconds=0.0)[0]) == 5
    found = samples(fns, 40, 0.0, min_rounds=3, enough=lambda times: len(times[1]) in (1, 2, 7))
    assert [len(t) for t in found] == [7, 7]


def test_saved_rows(tmp_path):
    path, about = str(tmp_path / "rows.jsonl"), {"machine": "this"}
    first = saved_rows.SavedRows(path, about)
    first.add("test", ["kernel", "eager"], {"kernel": {"samples": [1.0]}})
    with open(path, "a") as file:
        file.write('{"stamp": "cut o')
    again = saved_rows.SavedRows(path, about)
    assert again.get("test", ["kernel"]) == {"kernel": {"samples": [1.0]}}
    assert again.get("test", ["kernel", "compile"]) is None and again.get("other", []) is None
    assert saved_rows.SavedRows(path, {"machine": "another"}).get("test", ["kernel"]) is None
    assert saved_rows.SavedRows(None, about).get("test", ["kernel"]) is None


def result(*benchmarks, quick=False, when="2026-01-02T03:04:05.678+00:00", **fields):
    """What a run of the suites writes, of rows with a provider, microseconds and a ratio's
    interval."""
    about = {"machine": "this", "quick": quick, "threads": 2, "limits": {"copy": 1.0}, **fields}
    return {
        "machine_info": {"llmos": about},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": when,
        "benchmarks": [
            {
                "group": row,
                "params": {"provider": provider},
                "stats": {"median": us / 1e6},
                "extra_info": {"us": us, "bytes": 8, "products": "int8", "vs_eager_ci": span},
            }
            for row, provider, us, span in benchmarks
        ],
    }


A, B = "a [1] float32 forward", "b [2] bfloat16 backward"
FULL = result((A, "kernel", 2.0, [2.0, 2.2]), (A, "eager", 4.0, [1.0, 1.0]))
QUICK = [
    result(
        (A, "kernel", 9.0, [low, 2.5]),
        (B, "kernel", 5.0, [0.9, 1.1]),
        quick=True,
        limits={"copy": c},
    )
    for low, c in ((1.8, 3.0), (1.9, 2.0))
]


def test_baseline(tmp_path):
    """A line a row; times of a full run where there is one, the lowest interval of the quick
    runs."""
    made = baseline.make([QUICK[0], FULL, QUICK[1]])["this"]
    assert made["rows"] == [
        {
            "row": A,
            "us": {"kernel": 2.0, "eager": 4.0},
            "bytes": 8,
            "products": "int8",
            "ratio": [2.0, 2.2],
            "gate": [1.8, 2.5],
        },
        {
            "row": B,
            "us": {"kernel": 5.0},
            "bytes": 8,
            "products": "int8",
            "ratio": [0.9, 1.1],
            "gate": [0.9, 1.1],
        },
    ]
    assert made["limits"] == {"copy": 3.0} and [r["quick"] for r in made["runs"]] == [
        True,
        True,
        False,
    ]
    path = tmp_path / "this.json"
    baseline.save(made, path)
    assert baseline.load(path) == made and baseline.load(tmp_path / "none.json") == {"rows": []}
    assert sum(line.startswith('  {"row":') for line in path.read_text().splitlines()) == 2
    (read,) = model.read([path]).machines
    assert read.rows[A].ratio("eager") == 2.0 and read.rows[A].products == "int8"
    assert read.rows[A].ratio_interval("eager") == (2.0, 2.2)
    assert read.rows[B].direction == "backward" and read.limits == {"copy": 3.0}


def test_committed_baselines():
    """They are small, named by what is in them, and of use to the gate and the figure."""
    paths = list(baseline.FOLDER.glob("*.json"))
    assert paths and sum(p.stat().st_size for p in paths) < 200_000
    for path in paths:
        found = baseline.load(path)
        assert found["machine"] == path.stem
        assert path.stem == machine.cpu_name(found["cpu"], found["threads"])
        assert any("gate" in row for row in found["rows"])


def test_gate(monkeypatch, tmp_path, capsys):
    before = {"a": (2.0, 2.2), "b": (1.0, 1.1)}
    now = {"a": (1.5, 1.79), "b": (0.9, 1.0), "c": (0, 0)}
    assert list(gate.lost(now, before)) == ["a"]
    assert "1.79 times eager at the most, was 2.00" in gate.lost(now, before)["a"]
    monkeypatch.setattr(sys, "argv", ["gate.py"])
    monkeypatch.setattr(gate.machine, "name", lambda device: "this")
    monkeypatch.setattr(gate.baseline, "FOLDER", tmp_path)
    assert gate.main() == 0 and "there is no baseline for this" in capsys.readouterr().out
    baseline.save(baseline.make(QUICK)["this"], tmp_path / "this.json")
    runs = [{A: (1.0, 1.2), B: (0.2, 0.3)}, {A: (1.8, 2.0), B: (0.2, 0.3)}]
    monkeypatch.setattr(gate, "measured", lambda *_: runs.pop(0))
    assert gate.main() == 1 and "1 of 2 rows are slower" in capsys.readouterr().out
    runs = [{A: (1.8, 2.0), B: (0.9, 1.0)}]
    assert gate.main() == 0


def test_peers_give_the_same():
    """Those that need no compiler here; the rest is judged where it is timed."""
    from llmos_kernels.testing import CASES, run

    for case in CASES:
        if case.name in ("attention-causal", "layer_norm"):
            args = case.make(case.multi_block_shape, dtype=torch.float32)
            (exact, *_), (eager, *_) = run(case.reference, args), run(case.eager, args)
            for name in ("eager", "reference"):
                (found, *_) = run(peers.OPS[name](case), args)
                assert rows.error_over_budget(found, exact.double(), eager) <= 1
    layer = torch.nn.Linear(64, 32)
    x = torch.randn(5, 64)
    expected = F.linear(x, layer.weight, layer.bias)
    assert rows.relative(peers.dynamic(layer)(x), expected.double())["relative_error"] < 0.03


def bench(*arguments):
    # pytest-benchmark does not measure in a worker of xdist.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    command = [sys.executable, "-m", "llmos_kernels", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_a_run(tmp_path):
    """From the command to a page; a second run measures nothing anew."""
    pytest.importorskip("matplotlib")
    written, page, lines = (tmp_path / n for n in ("out.json", "page.html", "rows.jsonl"))
    flags = ["--quick", "--busy", "--op", "call*", "--resume", lines, "--benchmark-json", written]
    done = bench(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "call of layer_norm [1, 64] float32 inference" in done.stdout
    found = json.loads(written.read_text())
    assert {b["params"]["provider"] for b in found["benchmarks"]} == {"kernel", "eager"}
    kernel = next(b for b in found["benchmarks"] if b["params"]["provider"] == "kernel")
    assert kernel["extra_info"]["error_over_budget"] <= 1 and kernel["extra_info"]["peak_bytes"] > 0
    assert kernel["stats"]["median"] == pytest.approx(kernel["extra_info"]["us"] / 1e6, rel=0.01)
    about = found["machine_info"]["llmos"]
    assert about["limits"]["copy"] > 0 and about["settings"]["OMP_PROC_BIND"] == "close"
    assert "liger" in found["llmos"]["absent"]
    (read,) = model.read([written]).machines
    assert len(read.rows) == 2 and read.name == machine.name("cpu")
    (made,) = baseline.make([found]).values()
    assert len(made["rows"]) == 2 and made["cpu"] == machine.cpu()
    command = [sys.executable, Path(baseline.__file__).parent / "report", written, "--output", page]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "call of layer_norm" in page.read_text()
    assert "| call of layer_norm | inference |" in done.stdout
    kept_rows = lines.read_text()
    again = bench(*flags)
    assert again.returncode == 0 and lines.read_text() == kept_rows
    stats = lambda found: {b["fullname"]: b["stats"]["median"] for b in found["benchmarks"]}
    assert stats(json.loads(written.read_text())) == pytest.approx(stats(found))


def test_no_suites(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "SUITES", tmp_path)
    with pytest.raises(ValueError, match="bench runs in the source tree"):
        runner.run([])


def test_where_results_go(monkeypatch, tmp_path):
    """To build/results, unless a file is named; suites that are named run alone."""
    called = []
    done = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(
        runner.subprocess, "run", lambda command, env: called.append(command) or done
    )
    monkeypatch.setattr(runner, "SUITES", tmp_path / "benchmarks")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "conftest.py").touch()
    assert runner.run(["--quick"]) == 3 and runner.run(["bench_x.py", "--benchmark-json=x"]) == 3
    first, second = called
    results = Path(first[first.index("--benchmark-json") + 1]).parent
    assert results == tmp_path / "build" / "results" and results.is_dir()
    assert "--benchmark-json" not in second and str(runner.SUITES) not in second


def test_report_of_nothing(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    command = [sys.executable, Path(baseline.__file__).parent / "report", tmp_path / "x.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "x.json" in done.stderr
