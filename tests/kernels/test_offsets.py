"""Offsets in Triton kernels are 64 bits wide: rows may be further apart than 2^31 elements."""

import pytest
import torch

from llmos_kernels._core.registry import DEFINED
from llmos_kernels.testing import raw_calls

pytest.importorskip("triton")


def test_offset_lint_finds_a_product():
    from llmos_kernels._tools.inspect import overflows

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
    """Rows may be 2^30 elements apart; the memory between them is never touched nor allocated."""
    from llmos_kernels import testing

    case = next(c for c in testing.CASES if c.name == "layer_norm")
    op, args = next(
        c
        for c in raw_calls(case, case.make((4, 96), dtype=torch.bfloat16, requires_grad=True))
        if name in c[0].name()
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distant_memory = torch.empty(3 * 2**30 + 96, dtype=torch.bfloat16, device=device).as_strided(
        (4, 96), (2**30, 1)
    )

    def apart(a):
        return distant_memory.copy_(a) if a.shape == (4, 96) else a.to(device)

    tensors = [isinstance(a, torch.Tensor) for a in args]
    near = [a.to(device) if t else a for a, t in zip(args, tensors, strict=True)]
    # One input at a time, as all use the same distant memory.
    for i, a in enumerate(args):
        if tensors[i] and a.shape == (4, 96):
            distant = [*near[:i], apart(a), *near[i + 1 :]]
            expected = DEFINED[op.name()].launch(*near)
            for out, right in zip(DEFINED[op.name()].launch(*distant), expected, strict=True):
                assert torch.equal(out, right)


@pytest.mark.parametrize("distant_dim", [0, 1, 2, 3])
def test_attention_offsets_past_two_to_the_31(distant_dim):
    """Batches, heads, rows or columns of any input of attention may be 2^30 elements apart."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forward, backward = (
        DEFINED[f"llmos::attention_{name}"].launch for name in ("forward", "backward")
    )
    torch.manual_seed(0)
    inputs = [torch.randn(3, 3, 3, 3, dtype=torch.bfloat16, device=device) for _ in range(5)]

    def results(dout, q, k, v, mask):
        tensors, options = (q, k, v, mask, *(None,) * 4), (0.5, 0, 0.0, 0.0, None)
        out, stats = forward(*tensors, *options)
        return out, stats, *backward(dout, *tensors, out, stats, *options, True)

    expected = results(*inputs)
    strides = [3**3, 3**2, 3, 1]
    strides[distant_dim] = 2**30
    distant_memory = torch.empty(2**31 + 3**4, dtype=torch.bfloat16, device=device)
    distant_memory = distant_memory.as_strided((3, 3, 3, 3), strides)
    for i, t in enumerate(inputs):
        distant = [*inputs[:i], distant_memory.copy_(t), *inputs[i + 1 :]]
        for actual, right in zip(results(*distant), expected, strict=True):
            assert torch.equal(actual, right)


@pytest.mark.parametrize("distant_dim", [0, 1])
def test_linear_offsets_past_two_to_the_31(distant_dim):
    """Rows or columns of any matrix of a linear layer may be 2^30 elements apart."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forward, dinput, dweight = (
        DEFINED[f"llmos::linear_{name}"].launch for name in ("forward", "dinput", "dweight")
    )
    torch.manual_seed(0)
    inputs = [torch.randn(3, 3, dtype=torch.bfloat16, device=device) for _ in range(4)]
    if distant_dim == 1:  # All are stored by columns, like the distant one.
        inputs = [t.mT for t in inputs]

    def results(dout, x, weight, kept):
        dropout = 1, 0.0, None
        return (
            *forward(x, weight, None, *dropout, True),
            *dinput(dout, weight, kept, *dropout),
            *dweight(dout, x, True),
        )

    expected = results(*inputs)
    distant_memory = torch.empty(2**31 + 9, dtype=torch.bfloat16, device=device)
    distant_memory = distant_memory.as_strided(
        (3, 3), (2**30, 1) if distant_dim == 0 else (1, 2**30)
    )
    for i, t in enumerate(inputs):
        distant = [*inputs[:i], distant_memory.copy_(t), *inputs[i + 1 :]]
        for actual, right in zip(results(*distant), expected, strict=True):
            assert torch.equal(actual, right)
