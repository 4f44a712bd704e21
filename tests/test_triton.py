"""Triton kernels on a machine without a GPU: compiled for every target, and run past 2^31 elements."""

import os
import subprocess
import sys

import pytest
import torch

from llmos_kernels._registry import DEFINED
from llmos_kernels.testing import raw_calls

pytest.importorskip("triton")
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

# The interpreter replaces the compiler for a whole process, so the compiler gets its own.
COMPILE = """
import sys, torch
from llmos_kernels import _inspect
names = ("layer_norm", "add_layer_norm-dropout", "rms_norm")
launches = _inspect.launches((torch.float32, torch.bfloat16), (64, 768, 8192, 32768), names)
print(len(launches), "kernels")
for launch in launches:
    r = _inspect.resources(launch, sys.argv[1])
    assert r.spills == 0, f"{launch}: {r.spills} bytes spilled"
    assert r.shared <= 99 * 1024, f"{launch}: {r.shared} bytes of shared memory"
    assert not r.overflows, f"{launch}: 32-bit offsets {r.overflows}"
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_within_limits(arch):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, arch], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 20


def test_offset_lint_finds_a_product():
    from llmos_kernels._inspect import overflows

    ttir = """
      %c64 = arith.constant 64 : i32 loc(#loc)
      %pid = tt.get_program_id x : i32 loc(#loc1)
      %small = arith.muli %pid, %c64 : i32 loc(#loc2)
      %row = arith.muli %pid, %stride : i32 loc(#loc3)
      %p = tt.addptr %x, %small : !tt.ptr<f32>, i32 loc(#loc4)
      %q = tt.addptr %x, %row : !tt.ptr<f32>, i32 loc(#loc5)
    """
    assert overflows(ttir) == ["%row = arith.muli %pid, %stride : i32 loc(#loc3)"]


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_offsets_past_two_to_the_31(name):
    """Rows 2^30 elements apart; the memory between them is never touched, hence never there."""
    from llmos_kernels import testing

    case = next(c for c in testing.CASES if c.name == "layer_norm")
    op, args = next(
        c for c in raw_calls(case, (4, 96), dtype=torch.bfloat16) if name in c[0].name()
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    far = torch.empty(3 * 2**30 + 96, dtype=torch.bfloat16, device=device).as_strided(
        (4, 96), (2**30, 1)
    )

    def apart(a):
        return far.copy_(a) if a.shape == (4, 96) else a.to(device)

    tensors = [isinstance(a, torch.Tensor) for a in args]
    near = [a.to(device) if t else a for a, t in zip(args, tensors, strict=True)]
    # One input at a time: they share the far memory.
    for i, a in enumerate(args):
        if tensors[i] and a.shape == (4, 96):
            distant = [*near[:i], apart(a), *near[i + 1 :]]
            expected = DEFINED[op.name()].launch(*near)
            for out, right in zip(DEFINED[op.name()].launch(*distant), expected, strict=True):
                assert torch.equal(out, right)
