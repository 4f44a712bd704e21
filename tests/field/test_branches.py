"""A forward that looks at its input is kept, or its drop-in looks, too.

After pytorch/pytorch #61733: a trace on one input says nothing of others.
"""

import copy

import pytest
import torch
from field_parts import D, FeedForward, Norm
from torch import nn

import llmos_kernels as lk

pytestmark = pytest.mark.usefixtures("untimed")


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
    "grad mode": "self.body(x) * (2 if torch.is_grad_enabled() else 1)",
    "autocast": "self.body(x) * (2 if torch.is_autocast_enabled('cpu') else 1)",
    "dtype": "self.body(x.float() * 2 if x.dtype == torch.float64 else x)",
}
#: What a drop-in compares itself.
DECIDED_AT_EACH_CALL = ("dtype", "shape", "size()", "ndim", "dim()", "numel()")
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


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(D, D), nn.Dropout(0.0), nn.LayerNorm(D)

    def body(self, x, residual):
        return self.norm(self.dropout(self.dense(x)) + residual)


#: What a body is doubled by; later it is changed.
ATTRIBUTES = ("self.flag", "getattr(self, 'flag')", "self.width > 100", "self.mode == 'double'")


def pair(base, condition, given="x"):
    source = f"lambda self, {given}: self.body({given}) * 2 if {condition} else self.body({given})"
    cls = type("Branches", (base,), {"forward": eval(source, {"torch": torch}), "mode": "single"})
    stock = cls()
    vars(stock).update(flag=False, width=D)
    model = copy.deepcopy(stock)
    lk.optimize(model, always=True)
    assert type(model).__name__ == "FusedBranches"
    return stock, model


@pytest.mark.parametrize("base", [FeedForward, Norm, Residual])
@pytest.mark.parametrize("condition", ATTRIBUTES)
def test_an_attribute_that_changes_later(base, condition):
    stock, model = pair(base, condition, "x, residual" if base is Residual else "x")
    x = (torch.randn(3, D),) * (2 if base is Residual else 1)
    for change in ({}, {"flag": True}, {"width": 101}, {"mode": "double"}, {"mode": "single"}):
        vars(stock).update(change)
        vars(model).update(change)
        for again in (model, copy.deepcopy(model)):
            torch.testing.assert_close(again(*x), stock(*x))


def test_a_child_that_is_missing_later():
    class Optional(FeedForward):
        def forward(self, x):
            x = self.up(x)
            return self.down(x if self.act is None else self.act(x))

    stock = Optional()
    model = copy.deepcopy(stock)
    lk.optimize(model, always=True)
    assert type(model).__name__ == "FusedOptional"
    for either in (stock, model):
        either.act = None
    x = torch.randn(3, D)
    torch.testing.assert_close(model(x), stock(x))


@pytest.mark.parametrize(
    "condition",
    ["self.training", "len(x) > 64", "torch.is_grad_enabled()", "self.flag"],
)
def test_an_activation_with_a_branch_is_called(condition):
    source = f"lambda self, x: nn.functional.gelu(x) * (2 if {condition} else 1)"
    cls = type("Act", (nn.Module,), {"forward": eval(source, {"torch": torch, "nn": nn})})
    stock = nn.Sequential(nn.Linear(D, 32), cls(), nn.Linear(32, D))
    stock[1].flag = False
    model = copy.deepcopy(stock)
    lk.optimize(model, always=True)
    for either in (stock, model):
        either[1].flag = True
    for training in (False, True):
        for x in (torch.randn(3, D), torch.randn(70, D)):
            torch.testing.assert_close(model.train(training)(x), stock.train(training)(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x))
