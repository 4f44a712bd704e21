"""Run the tests of every op with the CPU kernels of each ISA that this machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmos_kernels import _C

TESTS = Path(__file__).parent


@pytest.mark.parametrize("level", _C.cpu_levels()[:-1])
def test_level(level):
    files = [TESTS / f"test_{name}.py" for name in ("ops", "kernels", "int8", "int8_linear")]
    args = ["-q", "-p", "no:cacheprovider", *files]
    chosen = "matches_reference or layouts or guard or masks or alone or integers or extreme"
    chosen = ["-k", f"({chosen}) and not triton"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *args, *chosen],
        env=os.environ | {"LLMOS_CPU_LEVEL": level, "LLMOS_SKIP_TRITON": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_level_in_use():
    wanted = os.environ.get("LLMOS_CPU_LEVEL") or _C.cpu_levels()[-1]
    assert _C.cpu_level() == wanted
