"""Made-up steps for ``tools/gpu_session/gpu.py``, and what their calls leave behind."""

import json
import sys
import zipfile
from pathlib import Path

import gpu
import gpu_merge
from gpu_steps import Step


def step(name, code="pass", seconds=5, **options):
    return Step(name, seconds, [sys.executable, "-c", code], folders=("csrc",), **options)


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


def alive(pid):
    """Return True if a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def waits(out):
    """For ever at first, with its number in a file; the next time not."""
    at = str(out / "pid")
    return (
        f"; import os, time; there = os.path.exists({at!r}); "
        f"open({at!r}, 'w').write(str(os.getpid())); time.sleep(0 if there else 60)"
    )
