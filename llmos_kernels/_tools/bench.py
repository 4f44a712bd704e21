"""``python -m llmos_kernels bench``: the suites of the source tree, with threads pinned."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

SUITES = Path(__file__).resolve().parent.parent / "benchmarks"


def pinned() -> dict[str, str]:
    """One thread a core, kept on its core; large tensors stay in the heap instead of being mapped and
    cleared at every call, for every provider alike. What is set already stays."""
    settings = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "OMP_PROC_BIND": "close",
        "OMP_PLACES": "cores",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    }
    return {k: os.environ.get(k, v) for k, v in settings.items()}


def run(arguments: Sequence[str]) -> int:
    """Run pytest on the suites with these arguments; the suites if they name none. ValueError where there
    is no source tree."""
    if not (SUITES / "conftest.py").exists():
        raise ValueError(f"there are no suites in {SUITES}: bench runs in the source tree")
    named = [a for a in arguments if a.partition("::")[0].endswith(".py")]
    command = [sys.executable, "-m", "pytest", "-q", "--progress", "--benchmark-quiet"]
    command += [*([] if named else [str(SUITES)]), *arguments]
    return subprocess.run(command, env=os.environ | pinned()).returncode
