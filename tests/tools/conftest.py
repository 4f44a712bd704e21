"""Where the steps of ``tools/gpu_session/gpu.py`` work in tests."""

import gpu
import gpu_archive
import gpu_runner
import pytest


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where steps work; they write their names to ``order``, and their sources are few."""
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "OUT", tmp_path / "out")
    monkeypatch.setattr(gpu_runner, "sources_sum", lambda folders: "these")
    monkeypatch.setattr(gpu, "gpu_name", lambda: None)
    return tmp_path / "work"


@pytest.fixture
def archive(out):
    """What comes back of a call."""
    return out.parent / "out" / gpu_archive.NAME
