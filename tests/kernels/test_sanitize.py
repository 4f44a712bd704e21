"""``make sanitize`` runs on a sanitized build, which detects a planted fault."""

import os
import subprocess
import sys

import pytest

SANITIZED = os.environ.get("LLMOS_SANITIZED")
pytestmark = pytest.mark.skipif(not SANITIZED, reason="make sanitize runs these")

OVERREAD = """
import sys, torch, llmos_kernels
x = torch.ones(64)
torch.ops.llmos_testing.overread(x if sys.argv[1] == "one_too_far" else x[:63])
"""


def test_sanitize_runs_on_a_sanitized_build():
    import llmos_kernels
    from llmos_kernels import _C

    assert llmos_kernels.__file__.startswith(SANITIZED)
    assert _C.build["sanitize"]


@pytest.mark.parametrize("where", ["inside", "one_too_far"])
def test_sanitize_catches_a_planted_overread(where):
    done = subprocess.run(
        [sys.executable, "-P", "-c", OVERREAD, where], capture_output=True, text=True
    )
    if where == "inside":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr and "overread" in done.stderr


def test_sanitize_catches_an_overread_of_an_emulated_kernel():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import emulated_cuda as e; e.plant('over-read')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "load_global" in done.stderr
