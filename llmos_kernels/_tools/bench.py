"""Start the benchmark suites of a source tree with their threads pinned; a wheel has none."""

import datetime
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

SUITES = Path(__file__).resolve().parents[2] / "benchmarks"


def pinned() -> dict[str, str]:
    """Return the environment of a run: each thread stays on its core, and large tensors stay in the
    heap instead of being mapped and cleared at every call, for every provider alike. What is set
    stays."""
    settings = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "OMP_PROC_BIND": "close",
        "OMP_PLACES": "cores",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    }
    return {k: os.environ.get(k, v) for k, v in settings.items()}


def run(arguments: Sequence[str]) -> int:
    """Run pytest on the suites, or on those that the arguments name, and return its exit status.

    The results go to ``build/results/``, unless ``--benchmark-json`` names a file.

    Raises:
        ValueError: There is no source tree.
    """
    if not (SUITES / "conftest.py").exists():
        raise ValueError(f"there are no suites in {SUITES}: bench runs in the source tree")
    named = [a for a in arguments if a.partition("::")[0].endswith(".py")]
    command = [sys.executable, "-m", "pytest", "-q", "--progress", "--benchmark-quiet"]
    if not any(a.partition("=")[0] == "--benchmark-json" for a in arguments):
        results = SUITES.parent / "build" / "results"
        results.mkdir(parents=True, exist_ok=True)
        name = f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}.json"
        command += ["--benchmark-json", str(results / name)]
    command += [*([] if named else [str(SUITES)]), *arguments]
    return subprocess.run(command, env=os.environ | pinned()).returncode
