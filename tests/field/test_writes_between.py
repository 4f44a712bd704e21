"""A tensor that is changed in place between the parts of what looks fused: no part is moved."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmos_kernels as lk
from llmos_kernels.integrations.compile.backend import backend

WRITES = {
    "clamp_": lambda h: h.clamp_(-1, 1),
    "inplace=True": lambda h: F.relu(h, inplace=True),
    "a positional inplace": lambda h: F.hardtanh(h, -1, 1, True),
    "a view": lambda h: h.view(-1).clamp_(-1, 1),
    "a slice": lambda h: h[:, :, 3].zero_(),
    "an element": lambda h: h.__setitem__((slice(None), 0), 0),
    "dropout": lambda h: F.dropout(h, 0.5, True, True),
}


class Sum(nn.Module):
    """The norm of a sum that ``write`` changes first."""

    def __init__(self, write):
        super().__init__()
        self.norm, self.write = nn.LayerNorm(32), write

    def forward(self, x, y):
        h = x + y
        self.write(h)
        return self.norm(h)


class Mask(nn.Module):
    """Attention whose mask is changed after the logits were computed."""

    def forward(self, x, mask, more):
        logits = x @ x.mT
        mask |= more
        return logits.masked_fill(mask, -1e9).softmax(-1) @ x


def optimized(model, *args):
    ours = copy.deepcopy(model)
    lk.optimize(ours, inputs=args, always=True)
    return ours


def compiled(model, *args):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, options={"then": "eager"})


@pytest.mark.parametrize("write", WRITES, ids=str)
@pytest.mark.parametrize("fuse", [optimized, compiled])
def test_a_sum_that_is_changed(fuse, write):
    torch.manual_seed(0)
    model = Sum(WRITES[write]).eval()
    x, y = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    ours = fuse(model, 0.1 * x, 0.1 * y)
    for scale in (0.1, 10):
        torch.manual_seed(1)
        expected = model(scale * x, scale * y)
        torch.manual_seed(1)
        torch.testing.assert_close(ours(scale * x, scale * y), expected)


@pytest.mark.parametrize("fuse", [optimized, compiled])
def test_a_mask_that_is_changed(fuse):
    x, none = torch.randn(2, 8, 32), torch.zeros(2, 8, 8, dtype=torch.bool)
    some = torch.rand(2, 8, 8) > 0.7
    ours = fuse(Mask(), x, none.clone(), none)
    expected = Mask()(x, none.clone(), some)
    torch.testing.assert_close(ours(x, none.clone(), some), expected)
