"""A forward that looks at its input is kept, or its drop-in looks, too.

After pytorch/pytorch #61733: a trace on one input says nothing of others.
"""

import copy

import pytest
import torch
from torch import nn

import llmos_kernels as lk

D = 16


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)

    def body(self, x):
        return self.down(self.act(self.up(x)))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), 1e-6

    def body(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


#: Bodies of a forward. More rows than a probe has, or another dtype or value, decide.
BRANCHES = {
    "shape": "self.body(x[:, :64] if x.shape[1] > 64 else x)",
    "size()": "self.body(x) * (2 if x.size(0) > 64 else 1)",
    "len": "self.body(x) * (2 if len(x) > 64 else 1)",
    "ndim": "self.body(x) * (2 if x.ndim == 4 else 1)",
    "dim()": "self.body(x) * (2 if x.dim() == 4 else 1)",
    "numel()": "self.body(x) * (2 if x.numel() > 10**5 else 1)",
    "requires_grad": "self.body(x) * (2 if x.requires_grad else 1)",
    "a value": "self.body(x) * (2 if x.max() > 100 else 1)",
    "dtype": "self.body(x.float() * 2 if x.dtype == torch.float64 else x)",
}
#: What a drop-in compares itself.
DECIDED_AT_EACH_CALL = ("dtype",)
INPUTS = {
    "long": torch.randn(2, 70, D),
    "many": torch.randn(70, 3, D),
    "large": torch.randn(90, 80, D),
    "4-D": torch.randn(1, 2, 3, D),
    "float64": torch.randn(2, 3, D, dtype=torch.float64),
    "gradient": torch.randn(2, 3, D).requires_grad_(),
    "great values": torch.full((2, 3, D), 200.0),
}


@pytest.mark.parametrize("base", [FeedForward, Norm])
@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_not_lost(base, name):
    forward = eval(f"lambda self, x: {BRANCHES[name]}", {"torch": torch})
    Branches = type("Branches", (base,), {"forward": forward})
    stock = Branches()
    model = copy.deepcopy(stock)
    lk.optimize(model, always=True)
    assert type(model) is Branches or name in DECIDED_AT_EACH_CALL
    for what, x in INPUTS.items():
        try:
            expected = stock(x)
        except RuntimeError:  # float64 beside float32 weights.
            with pytest.raises((RuntimeError, TypeError)):
                model(x)
            continue
        torch.testing.assert_close(model(x), expected, msg=what)
