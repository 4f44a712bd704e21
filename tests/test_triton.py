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
NORMS = """
import sys, torch
from llmos_kernels import _inspect
names = ("layer_norm", "add_layer_norm-dropout", "rms_norm")
launches = _inspect.launches((torch.float32, torch.bfloat16), (64, 768, 8192, 32768), names)
"""

ATTENTION = """
import sys, torch
from llmos_kernels import _inspect
from llmos_kernels._registry import DEFINED
forward, weights, backward = (
    DEFINED[f"llmos::attention_{name}"].launch for name in ("forward", "weights", "backward")
)
def attend(d, dtype, mask=None, padding=None, packed=None, causal=1, dropout_p=0.0, keys=512):
    queries = 1 if keys > 512 else keys
    q, k, v, dout = (torch.empty(2, n, 4, d, dtype=dtype).transpose(1, 2)
                     for n in (queries, keys, keys, queries))
    if packed is not None:
        q, k, v, dout = (t[:1] for t in (q, k, v, dout))
    seed = torch.empty(2, dtype=torch.int64)
    tensors, options = (q, k, v, mask, padding, packed, packed), (d**-0.5, causal, dropout_p, seed)
    out, stats = forward(*tensors, *options)
    if packed is None:
        weights(q, k, mask, padding, stats, *options, False)
    backward(dout, *tensors, out, stats, *options, mask is not None and mask.is_floating_point())
bf16 = torch.bfloat16
mask = torch.empty(1, 4, 512, 512)
padding = torch.empty(2, 512, dtype=torch.bool)
with _inspect.recorded_launches() as launches:
    for d in (64, 128, 256):
        attend(d, bf16)
        attend(d, bf16, mask > 0, causal=0)
        attend(d, bf16, keys=2048, causal=0)
    for d in (64, 128):
        attend(d, bf16, mask, dropout_p=0.1)
        attend(d, torch.float32)
    attend(64, bf16, padding=padding, dropout_p=0.1)
    attend(64, bf16, packed=torch.empty(5, dtype=torch.int32), dropout_p=0.1)
launches = list(dict.fromkeys(launches))
"""

# What the scripts above have launched, within the limits; on sm_90 tensor cores of its own kind.
CHECK = """
print(len(launches), "kernels")
for launch in launches:
    r = _inspect.resources(launch, sys.argv[1])
    assert r.spills == 0, f"{launch}: {r.spills} bytes spilled"
    assert r.shared <= 99 * 1024, f"{launch}: {r.shared} bytes of shared memory"
    assert not r.overflows, f"{launch}: 32-bit offsets {r.overflows}"
    if sys.argv[1] == "sm_90" and launch.name == "_forward_kernel" and "*fp32" not in str(launch.signature):
        assert r.wgmma, launch
"""


@pytest.mark.parametrize("script", [NORMS, ATTENTION], ids=["norms", "attention"])
@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_within_limits(arch, script):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script + CHECK, arch], env=env, capture_output=True, text=True
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


@pytest.mark.parametrize("far_dim", [0, 1, 2, 3])
def test_attention_offsets_past_two_to_the_31(far_dim):
    """The same for every input of attention, with batches, heads, rows or columns that far apart."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forward, backward = (
        DEFINED[f"llmos::attention_{name}"].launch for name in ("forward", "backward")
    )
    torch.manual_seed(0)
    inputs = [torch.randn(3, 3, 3, 3, dtype=torch.bfloat16, device=device) for _ in range(5)]

    def results(dout, q, k, v, mask):
        tensors, options = (q, k, v, mask, None, None, None), (0.5, 0, 0.0, None)
        out, stats = forward(*tensors, *options)
        return out, stats, *backward(dout, *tensors, out, stats, *options, True)

    expected = results(*inputs)
    strides = [3**3, 3**2, 3, 1]
    strides[far_dim] = 2**30
    far = torch.empty(2**31 + 3**4, dtype=torch.bfloat16, device=device)
    far = far.as_strided((3, 3, 3, 3), strides)
    for i, t in enumerate(inputs):
        distant = [*inputs[:i], far.copy_(t), *inputs[i + 1 :]]
        for actual, right in zip(results(*distant), expected, strict=True):
            assert torch.equal(actual, right)
