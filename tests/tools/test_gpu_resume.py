"""What a call of ``tools/gpu_session/gpu.py`` brings back, and how the next one goes on from it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_archive
import gpu_calls
import gpu_merge
import gpu_runner
import pytest
from gpu_calls import alive, inside, outcomes, ran, step, table, written
from gpu_runner import Runner

DRIVER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import gpu, gpu_runner, gpu_calls as t
from pathlib import Path
out = Path(sys.argv[3])
gpu_runner.sources_sum = lambda folders: "these"
gpu.WORK, gpu.OUT = out, out.parent / "out"
steps = [t.step(n, t.written(out, n) + (t.waits(out) if n == "b" else "")) for n in "abc"]
gpu.slices = lambda *_: {"one": steps}
sys.exit(gpu.main([f"--resume-from={name}" for name in sys.argv[4:]]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_goes_on_after_a_kill(tmp_path, number):
    """At the step that was running; its processes, in a session of their own, are ended."""
    out = tmp_path / "out"
    tools, helpers = Path(gpu.__file__).parent, Path(gpu_calls.__file__).parent
    command = [sys.executable, "-c", DRIVER, tools, helpers, out]
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
