"""``tools/gpu_session/gpu.py`` with made-up steps: their order, limits and sources, and merging."""

import json
import os
import re
import time

import gpu
import gpu_archive
import gpu_merge
import gpu_runner
import gpu_steps
import pytest
from gpu_calls import alive, ran, step, table, written
from gpu_runner import BUDGET, Runner


@pytest.mark.parametrize(("variable", "seen", "arch"), [("8.6", "9.0", "8.6"), ("", "8.0", "8.0")])
def test_the_gpu_that_is_seen_is_built_for(variable, seen, arch, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho {seen}\necho 7.5\n")
    smi.chmod(0o755)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", variable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_steps.compute_capability() == arch
    smi.unlink()
    assert gpu_steps.compute_capability() == (variable or "9.0")


def test_order_and_a_failing_step(out, monkeypatch, capsys):
    """It does not stop the others; what has passed is not run again, what failed comes last."""
    made = [
        step("build", written(out, "build"), always=True),
        step("a", written(out, "a") + "; raise SystemExit(3)"),
        step("b", written(out, "b")),
    ]
    table(monkeypatch, one=made, two=[made[0], step("c", written(out, "c"))])
    assert gpu.main(["one"]) == 1
    assert ran(out) == ["build", "a", "b"]
    assert gpu_merge.read(out / "summary.json")["a"]["rc"] == 3
    assert gpu.main([]) == 1
    assert ran(out) == ["build", "c", "a"]
    assert gpu.main(["--slice", "two"]) == 0 and ran(out) == []
    assert gpu.main(["--again", "two"]) == 0 and ran(out) == ["build", "c"]
    capsys.readouterr()
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one              15 s (estimate)"
    assert lines[2:4] == ["  a                 5 s  failed", "  b                 5 s  passed"]
    assert lines[-1] == "all              20 s (estimate)"
    with pytest.raises(SystemExit):
        gpu.main(["three"])
    assert "no slice three, only one, two" in capsys.readouterr().err


def test_sources(out, monkeypatch, tmp_path):
    """Other sources run again, without what was measured of the former."""
    table(monkeypatch, one=[step("a", written(out, "a"), keeps=("a.jsonl",))])
    assert gpu.main([]) == 0
    (out / "a.jsonl").write_text("{}\n")
    monkeypatch.setattr(gpu_runner, "sources_sum", lambda folders: "others")
    assert gpu.main([]) == 0
    assert ran(out) == ["a", "a"] and not (out / "a.jsonl").exists()


def test_sum_of_sources(tmp_path):
    folder = tmp_path / "tests"
    (folder / "__pycache__").mkdir(parents=True)
    sums = [gpu_runner.sources_sum(["tests"], tmp_path)]
    for name in ("a.py", "b.py", "__pycache__/a.py", "notes.md"):
        (folder / name).write_text("1")
        sums.append(gpu_runner.sources_sum(["tests"], tmp_path))
    assert len(set(sums)) == 3 and sums[2:] == [sums[2]] * 3
    assert gpu_runner.sources_sum(gpu_steps.TESTED) != gpu_runner.sources_sum(gpu_steps.MEASURED)


#: Starts two processes, one of them in a session of its own, and waits.
CHILDREN = """
import subprocess, sys, time
for own in (False, True):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(command, start_new_session=own, stderr=subprocess.DEVNULL)
    print(child.pid, flush=True)
"""
WAIT = "time.sleep(60)\n"
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
KEEPS = "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('kept')\n"


@pytest.mark.parametrize(
    "ends, goes_on, outcome",
    [(KEEPS, True, "partial"), (KEEPS, False, "failed"), (DEAF + WAIT, True, "partial")],
    ids=["keeps", "not resumable", "deaf"],
)
def test_time_limit(out, ends, goes_on, outcome):
    """SIGINT, then SIGKILL; nothing that the step has started is left."""
    runner = Runner(out, budget=4.0, grace=3.0)
    began = time.monotonic()
    assert runner.run(step("a", CHILDREN + ends, goes_on=goes_on)) == outcome
    assert 0.9 < time.monotonic() - began < 12
    row = gpu_merge.read(out / "summary.json")["a"]
    first, second, *rest = row["tail"].split()
    assert row["rc"] == "time limit" and rest == ["kept"] * (ends == KEEPS)
    assert not alive(int(first)) and not alive(int(second))


def test_nothing_is_left_after_the_end(out):
    runner = Runner(out)
    assert runner.run(step("a", CHILDREN)) == "passed"
    assert not any(map(alive, map(int, runner.rows["a"]["tail"].split())))


def test_budget(out, monkeypatch, capsys):
    """What does not fit is left, what goes on starts in what there is, and the first in any
    case."""
    call = ["--seconds", "80"]
    steps = [
        step("build", written(out, "build"), always=True, seconds=100),
        step("a", written(out, "a"), seconds=100),
        step("b", written(out, "b"), seconds=100),
        step("c", written(out, "c"), seconds=100, goes_on=True),
    ]
    table(monkeypatch, one=steps)
    assert gpu.main(call) == 0
    assert ran(out) == ["build", "a", "c"]
    shown = capsys.readouterr().out
    assert re.search(r"^took \d of 80 s\nleft for the next call: b$", shown, re.MULTILINE)
    assert "estimate of what is left: 100 s, and 100 s in each call" in shown
    assert gpu.main(call) == 0
    assert ran(out) == ["build", "b"]
    shown = capsys.readouterr().out
    assert "took " in shown and "left" not in shown


@pytest.mark.parametrize("given", ["10", "inf", "nan", "x"])
def test_seconds_that_a_call_cannot_take(out, monkeypatch, given, capsys):
    table(monkeypatch, one=[])
    with pytest.raises(SystemExit):
        gpu.main(["--seconds", given])
    assert "--seconds" in capsys.readouterr().err


def test_estimate_of_what_was_begun(out):
    """What is left of it, but no less than makes a start worth it."""
    runner, made = Runner(out), step("a", seconds=100, goes_on=True)
    for spent, needed in ((30, 70), (90, gpu_runner.LEAST)):
        runner.rows["a"] = {"sources": "these", "outcome": "partial", "seconds": spent}
        assert runner.needs(made) == needed


def bench(when, **seconds):
    return {
        "datetime": when,
        "machine_info": {"when": when},
        "benchmarks": [{"fullname": k, "seconds": v} for k, v in seconds.items()],
    }


def test_what_a_step_writes(out):
    """Its junit file goes into tests.json, its benchmarks beside those of its earlier runs."""
    runner, xml = Runner(out), out / "a.xml"
    gpu_merge.write(out / "tests.json", {"b": {"tests": 1}})
    gpu_merge.write(out / "a.json", bench("1", x=1, y=1))
    gpu_merge.write(out / "made", bench("2", y=2))
    failing = "<testcase classname='m' name='t'><failure>why</failure></testcase>"
    counts = "tests='2' failures='1' errors='0' skipped='0'"
    text = f"<testsuites><testsuite {counts}>{failing}</testsuite></testsuites>"
    code = f"open({str(xml)!r}, 'w').write({text!r}); import os; os.rename({str(out / 'made')!r}, "
    assert runner.run(step("a", code + f"{str(out / 'a.new.json')!r})")) == "passed"
    tests = gpu_merge.read(out / "tests.json")
    assert tests["b"] == {"tests": 1} and tests["a"]["failures"] == 1
    assert tests["a"]["bad"] == [{"test": "m::t", "kind": "failure", "text": "why"}]
    assert gpu_merge.read(out / "a.json") == bench("2", x=1, y=2)
    (out / "a.jsonl").touch()
    assert runner.run(step("a", "raise SystemExit(1)", resume="a.jsonl")) == "failed"
    assert (out / "a.jsonl").exists()
    assert runner.run(step("a", resume="a.jsonl")) == "passed"
    assert sorted(p.name for p in out.iterdir()) == ["a.json", "summary.json", "tests.json"]


def test_merge(monkeypatch, tmp_path, capsys):
    """Newer rows win, in whatever order they are merged."""
    results = tmp_path / "results"
    monkeypatch.setattr(gpu, "RESULTS", results)
    calls = [tmp_path / "first", tmp_path / "second"]
    for i, folder in enumerate(calls):
        gpu_merge.write(folder / "about.json", {"machine": "nvidia-a100"})
        rows = {"both": {"started": i, "rc": i}, f"only {i}": {"started": i}}
        gpu_merge.write(folder / "summary.json", rows)
        gpu_merge.write(folder / "tests.json", {"tests": {"started": i}})
        gpu_merge.write(folder / "models.json", bench(str(i), both=i, **{f"only{i}": i}))
        gpu_merge.write(folder / "tuned.json", {"format": i})
        (folder / "models.jsonl").write_text(f'"both"\n"{i}"\n')
    gpu_archive.archive_folder(calls[0], tmp_path / gpu_archive.NAME)
    assert gpu.main(["--merge", str(calls[1]), str(tmp_path / gpu_archive.NAME)]) == 0
    target = results / "nvidia-a100"
    assert str(target) in capsys.readouterr().out
    assert gpu_merge.read(target / "summary.json") == {
        "both": {"started": 1, "rc": 1},
        "only 1": {"started": 1},
        "only 0": {"started": 0},
    }
    assert gpu_merge.read(target / "tests.json") == {"tests": {"started": 1}}
    assert gpu_merge.read(target / "models.json") == bench("1", both=1, only0=0, only1=1)
    assert (target / "models.jsonl").read_text() == '"both"\n"1"\n"0"\n'
    assert gpu_merge.read(target / "tuned.json") == {"format": 1}
    assert gpu.main(["--merge", str(results)]) == 2
    assert "names no machine" in capsys.readouterr().err


def test_damaged_summary(out):
    out.mkdir()
    (out / "summary.json").write_text('{"a": {"outco')
    assert Runner(out).rows == {}


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_the_slices(out, rehearse, carried):
    """Each fits a call, and the first one leaves time for more where the build is carried."""
    slices = gpu_steps.slices(out, rehearse, carried)
    assert list(slices) == [
        "first",
        "ops-forward",
        "tune",
        "tests",
        "sanitizer",
        "cuda",
        "ops-backward",
        "models",
        "stress",
        "tune-float16",
    ]
    for name, steps in slices.items():
        assert sum(s.seconds for s in steps) <= BUDGET, name
        assert [s.name for s in steps[:2]] == ["build", "about"]
    first = slices["first"]
    assert [s.name for s in first[2:]] == ["tests", "pack", "required", "memcheck"]
    assert sum(s.seconds for s in first) <= (300 if carried else 430)
    each = {s.name: s for steps in slices.values() for s in steps}
    assert json.dumps({n: [str(c) for c in s.command] for n, s in each.items()})
    assert all(type(v) is str for s in each.values() for v in s.env.values())
    assert os.path.isabs(each["pack"].product)
    assert str(gpu_steps.PEERS) in each["models"].env["PYTHONPATH"].split(os.pathsep)


def test_files_that_steps_name():
    """One that is not there is an error: pytest would ignore nothing, and say nothing."""
    found = gpu_steps.ROOT / gpu_steps._test("test_kernels.py")
    assert found.is_file()
    with pytest.raises(FileNotFoundError, match=r"0 files in tests are named test_moved\.py"):
        gpu_steps._test("test_moved.py")
