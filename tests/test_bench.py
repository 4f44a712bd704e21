"""The harness: who is asked, who has no time, what is kept, what a page is made of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gate
import kept
import peers
import pytest
import rows
import torch
import torch.nn.functional as F

from llmos_kernels import _bench, _report
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
        "kernel": "error 1.1 times its budget", "eager": "NotImplementedError: not for this",
    }  # fmt: skip
    with pytest.raises(NotImplementedError):
        made_row(kernel=fails)
    int8 = rows.Call(lambda: 0, (), rows.relative(torch.ones(4), torch.ones(4).double() * 1.1))
    assert int8.wrong == "relative error 0.0909"


def test_measured(monkeypatch):
    """Each provider's samples, ratios by round, the error; nothing where others were at work."""
    taken = {"kernel": [1.0, 2.0, 3.0], "eager": [2.0, 5.0, 6.0]}
    monkeypatch.setattr(rows, "times", lambda *_: (taken, {}))
    monkeypatch.setattr(rows.rates, "share_of_limits", lambda *_: {"GB/s": 1.0, "share": 0.5})
    monkeypatch.setattr(rows.machine.Watch, "disturbed", lambda *_: None)
    row = made_row(kernel=answer(0.9), eager=answer(0.5), odd=fails)
    found = rows.measure(row, 3, 1.0, busy=False)
    own = found["kernel"]["extra"]
    assert own["vs_eager"] == 2.0 and own["vs_eager_ci"] == [2.0, 2.5] and own["us"] == 2e6
    assert own["goal"] == {"eager": 2.0} and own["error_over_budget"] == 0.9 and "ours" not in own
    assert found["eager"]["samples"] == taken["eager"] and "goal" not in found["eager"]["extra"]
    assert found["odd"]["wrong"].startswith("NotImplementedError")
    monkeypatch.setattr(rows.machine.Watch, "disturbed", lambda *_: "others")
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


def test_kept(tmp_path):
    path, about = str(tmp_path / "rows.jsonl"), {"machine": "this"}
    first = kept.Kept(path, about)
    first.add("test", ["kernel", "eager"], {"kernel": {"samples": [1.0]}})
    with open(path, "a") as file:
        file.write('{"stamp": "cut o')
    again = kept.Kept(path, about)
    assert again.get("test", ["kernel"]) == {"kernel": {"samples": [1.0]}}
    assert again.get("test", ["kernel", "compile"]) is None and again.get("other", []) is None
    assert kept.Kept(path, {"machine": "another"}).get("test", ["kernel"]) is None
    assert kept.Kept(None, about).get("test", ["kernel"]) is None


def test_gate(tmp_path):
    before, now = (
        {"a": (2.0, 2.2), "b": (1.0, 1.1)},
        {"a": (1.5, 1.79), "b": (0.9, 1.0), "c": (0, 0)},
    )
    assert list(gate.lost(now, before)) == ["a"]
    assert gate.lowest([before, {"a": (1.7, 2.4), "d": (3.0, 4.0)}]) == {
        "a": (1.7, 2.4), "b": (1.0, 1.1), "d": (3.0, 4.0),
    }  # fmt: skip
    assert "1.79 times eager at the most, was 2.00" in gate.lost(now, before)["a"]


def test_peers_give_the_same():
    """Those that need no compiler here; the rest is judged where it is timed."""
    from llmos_kernels.testing import CASES, run

    for case in CASES:
        if case.name in ("attention-causal", "layer_norm"):
            args = case.make(case.medium, dtype=torch.float32)
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
    own = next(b for b in found["benchmarks"] if b["params"]["provider"] == "kernel")
    assert own["extra_info"]["error_over_budget"] <= 1 and own["extra_info"]["peak_bytes"] > 0
    assert own["stats"]["median"] == pytest.approx(own["extra_info"]["us"] / 1e6, rel=0.01)
    about = found["machine_info"]["llmos"]
    assert about["limits"]["copy"] > 0 and about["settings"]["OMP_PROC_BIND"] == "close"
    assert "liger" in found["llmos"]["absent"]
    (machine,) = _report.read([written]).machines
    assert len(machine.rows) == 2
    done = bench("report", written, "--output", page)
    assert done.returncode == 0 and "call of layer_norm" in page.read_text()
    assert "| call of layer_norm | inference |" in done.stdout
    kept_rows = lines.read_text()
    again = bench(*flags)
    assert again.returncode == 0 and lines.read_text() == kept_rows
    stats = lambda found: {b["fullname"]: b["stats"]["median"] for b in found["benchmarks"]}
    assert stats(json.loads(written.read_text())) == pytest.approx(stats(found))


def test_no_suites(monkeypatch, tmp_path):
    monkeypatch.setattr(_bench, "SUITES", Path(tmp_path))
    with pytest.raises(ValueError, match="bench runs in the source tree"):
        _bench.run([])


def test_report_of_nothing(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    done = bench("report", tmp_path / "x.json")
    assert done.returncode == 2 and "x.json" in done.stderr
