"""``tools/gpu_session/gpu.py`` with made-up steps: order, limits, what is kept, what the next call
does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu
import gpu_archive
import gpu_merge
import gpu_runner
import gpu_steps
import pytest
from gpu_runner import BUDGET, Runner
from gpu_steps import Step


def step(name, code="pass", seconds=5, **options):
    return Step(name, seconds, [sys.executable, "-c", code], folders=("csrc",), **options)


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where steps work; they write their names to ``order``, and their sources are few."""
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "OUT", tmp_path / "out")
    monkeypatch.setattr(gpu_runner, "sources_sum", lambda folders: "these")
    monkeypatch.setattr(gpu, "gpu_name", lambda: None)
    return tmp_path / "work"


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


@pytest.fixture
def archive(out):
    """What comes back of a call."""
    return out.parent / "out" / gpu_archive.NAME


def inside(archive, name):
    with zipfile.ZipFile(archive) as opened:
        return json.loads(opened.read(name))


def written(out, name):
    return f"open({str(out / 'order')!r}, 'a').write('{name} ')"


def table(monkeypatch, **slices):
    monkeypatch.setattr(gpu, "slices", lambda out, rehearse, carried: slices)


def ran(out):
    """The steps that were run since it was asked last."""
    order = out / "order"
    names = order.read_text().split() if order.exists() else []
    order.unlink(missing_ok=True)
    return names


def outcomes(out):
    return {k: row["outcome"] for k, row in gpu_merge.read(out / "summary.json").items()}


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


def alive(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


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


DRIVER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import gpu, gpu_runner, test_gpu_slices as t
from pathlib import Path
out = Path(sys.argv[3])
gpu_runner.sources_sum = lambda folders: "these"
gpu.WORK, gpu.OUT = out, out.parent / "out"
steps = [t.step(n, t.written(out, n) + (t.waits(out) if n == "b" else "")) for n in "abc"]
gpu.slices = lambda *_: {"one": steps}
sys.exit(gpu.main([f"--resume-from={name}" for name in sys.argv[4:]]))
"""


def waits(out):
    """For ever at first, with its number in a file; the next time not."""
    at = str(out / "pid")
    return (
        f"; import os, time; there = os.path.exists({at!r}); "
        f"open({at!r}, 'w').write(str(os.getpid())); time.sleep(0 if there else 60)"
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_goes_on_after_a_kill(tmp_path, number):
    """At the step that was running; its processes, in a session of their own, are ended."""
    out = tmp_path / "out"
    tools, tests = Path(gpu.__file__).parent, Path(__file__).parent
    command = [sys.executable, "-c", DRIVER, tools, tests, out]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 10
    while not (out / "pid").exists() or not (out / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    pid = int((out / "pid").read_text())
    runner.send_signal(number)
    runner.communicate()
    assert runner.returncode == (-number if number == signal.SIGKILL else 130)
    assert outcomes(out) == {"a": "passed", "b": "running"}
    assert alive(pid) == (number == signal.SIGKILL)
    assert ran(out) == ["a", "b"]
    archive = tmp_path / "out" / gpu_archive.NAME
    kept = {k: row["outcome"] for k, row in inside(archive, "summary.json").items()}
    assert kept == {"a": "passed", "b": "running"}
    (out / "summary.json").unlink()
    done = subprocess.run([*command, archive], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not alive(pid)
    assert ran(out) == ["b", "c"] and set(outcomes(out).values()) == {"passed"}


def test_resume_from(out, archive, monkeypatch, tmp_path):
    """Where what an earlier call has left is gone: from its archive, or the folder that has it."""
    table(monkeypatch, one=[step("a", written(out, "a")), step("b", written(out, "b"))])
    assert gpu.main([]) == 0 and ran(out) == ["a", "b"]
    summary = gpu_merge.read(out / "summary.json")
    earlier = tmp_path / "earlier"
    gpu_merge.write(earlier / "summary.json", {"a": summary["a"]})
    kept = tmp_path / "kept" / gpu_archive.NAME
    gpu_archive.archive_folder(earlier, kept)
    for given in (kept, kept.parent, earlier):
        (out / "summary.json").unlink()
        assert gpu.main(["--resume-from", str(given)]) == 0 and ran(out) == ["b"]
        assert set(inside(archive, "summary.json")) == {"a", "b"}


def test_resume_keeps_what_is_newer(out, tmp_path):
    """On a machine that is warm."""
    for i, folder in enumerate((tmp_path / "earlier", out)):
        gpu_merge.write(folder / "summary.json", {"a": {"started": i}})
        gpu_merge.write(folder / "tuned.json", {"format": i})
        (folder / "a.jsonl").write_text(f'{i}\n{{"half')
    gpu.resume(tmp_path / "earlier")
    assert gpu_merge.read(out / "summary.json") == {"a": {"started": 1}}
    assert gpu_merge.read(out / "tuned.json") == {"format": 1}
    assert (out / "a.jsonl").read_text() == '1\n{"half\n0\n'


def test_resume_on_another_gpu(out, tmp_path, monkeypatch, capsys):
    """Two machines' results are not mixed."""
    gpu_merge.write(tmp_path / "earlier" / "about.json", {"machine": "nvidia-a100-80gb-pcie"})
    gpu_merge.write(tmp_path / "earlier" / "tuned.json", {"format": 1})
    monkeypatch.setattr(gpu, "gpu_name", lambda: "nvidia-l40s")
    gpu.resume(tmp_path / "earlier")
    assert "from nvidia-a100-80gb-pcie, this GPU is nvidia-l40s" in capsys.readouterr().out
    assert not out.exists()
    monkeypatch.setattr(gpu, "gpu_name", lambda: "nvidia-a100-80gb-pcie")
    gpu.resume(tmp_path / "earlier")
    assert gpu_merge.read(out / "tuned.json") == {"format": 1}


def test_archive_after_each_step(out, archive, monkeypatch):
    """It is all that lies in OUT, whatever there is to keep."""
    seen = []

    def archive_folder(folder, to, real=gpu_archive.archive_folder):
        real(folder, to)
        rows = inside(to, "summary.json")
        seen.append("".join(f"{name}:{row['outcome'][0]}" for name, row in rows.items()))

    monkeypatch.setattr(gpu_archive, "archive_folder", archive_folder)
    many = "; ".join(f"open({str(out / f'{i}.json')!r}, 'w').write('{i}')" for i in range(12))
    table(monkeypatch, one=[step("a", many), step("b", "raise SystemExit(1)")])
    assert gpu.main([]) == 1
    assert seen == ["a:r", "a:p", "a:pb:r", "a:pb:f", "a:pb:f"]
    assert [inside(archive, f"{i}.json") for i in range(12)] == [*range(12)]
    assert [p.name for p in archive.parent.iterdir()] == [gpu_archive.NAME]


def test_archive_while_a_step_runs(out, archive, monkeypatch):
    """The rows that a step has measured come back though the call is killed."""
    monkeypatch.setattr(gpu_runner, "EVERY", 0.05)
    runner = Runner(out, 3.0, 1.0, lambda: gpu_archive.archive_folder(out, archive))
    code = f"open({str(out / 'a.jsonl')!r}, 'w').write('1'); import time, zipfile; time.sleep(0.6)"
    code += f"; print(zipfile.ZipFile({str(archive)!r}).namelist())"
    assert runner.run(step("a", code)) == "passed"
    assert "a.jsonl" in runner.rows["a"]["tail"]


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
