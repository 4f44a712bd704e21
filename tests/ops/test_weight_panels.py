"""Packed copies of weights give the same bits, and follow every write that torch sees."""

import pytest
import torch
from torch import nn

from llmos_kernels.ops._weight_panels import WeightPanels, linear_panels
from llmos_kernels.testing import DTYPES
from llmos_kernels.testing.cases import encoder_layer as cases

#: (batch, length, d, hidden, heads): GEMV, one row more, odd widths, more than one part of depth.
SHAPES = (*cases.SHAPES, (1, 5, 100, 1700, 4), (1, 300, 40, 72, 2), (1, 0, 8, 8, 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits(shape, apart, dtype):
    given = cases.make(shape, "padding", apart=apart).to(dtype)
    panels = [linear_panels(w) for w in given.parameters.weights()]
    op = torch.ops.llmos.encoder_layer
    assert torch.equal(op(*given.flat(panels)), op(*given.flat()))


def test_any_strides():
    weight = torch.randn(70, 45)
    expected = linear_panels(weight)
    assert expected.dtype == torch.uint8 and expected.numel() >= weight.numel() * 4
    for other in (weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :45]):
        x = cases.make((1, 6, 45, 70, 3))
        same = x.parameters._replace(weight1=other)
        panels = [linear_panels(w) for w in same.weights()]
        plain = x._replace(parameters=x.parameters._replace(weight1=weight))
        op = torch.ops.llmos.encoder_layer
        assert torch.equal(op(*x._replace(parameters=same).flat(panels)), op(*plain.flat()))


def test_wrong_panels():
    given = cases.make((1, 12, 48, 192, 4))
    panels = [linear_panels(w) for w in given.parameters.weights()]
    op = torch.ops.llmos.encoder_layer
    for wrong, named in (
        (panels[:-1], "expected 4 weights in panels, got 3"),
        ([*panels[:-1], panels[-1][1:]], "contiguous bytes of panels"),
        ([*panels[:-1], panels[-1].view(torch.int8)], "contiguous bytes of panels"),
    ):
        with pytest.raises(RuntimeError, match=named):
            op(*given.flat(wrong))


@torch.no_grad()
def written(weight):
    """Yield what each kind of write that torch sees leaves as the weight."""
    yield weight
    weight.mul_(2)
    yield weight
    weight[0, 0] = 3
    yield weight
    nn.init.ones_(weight)
    yield weight
    weight.data = torch.randn_like(weight)
    yield weight
    yield nn.Parameter(torch.randn_like(weight))
    yield nn.Parameter(weight.detach().t().contiguous().t())
    yield nn.Parameter(weight.detach().bfloat16())


def test_copies_follow_writes():
    panels, seen = WeightPanels(), []
    for weight in written(nn.Parameter(torch.randn(70, 33))):
        (copy,) = panels.of([weight])
        assert torch.equal(copy, linear_panels(weight.detach()))
        assert panels.of([weight])[0] is copy, "made once"
        seen.append(copy)
    assert len({id(copy) for copy in seen}) == len(seen)


def test_memory_is_not_taken_for_the_weight_before():
    """A new weight can get the memory of one that is gone."""
    panels = WeightPanels()
    for _ in range(50):
        weight = nn.Parameter(torch.randn(64, 64))
        assert torch.equal(panels.of([weight])[0], linear_panels(weight.detach()))
        del weight
