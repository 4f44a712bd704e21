"""A swapped ``nn.Sequential`` that is edited computes what its children say; slices are stock."""

import copy

import pytest
import torch
from torch import nn

import llmos_kernels as lk

EDITS = {
    "append": lambda s: s.append(nn.Tanh()),
    "insert": lambda s: s.insert(1, nn.Tanh()),
    "extend": lambda s: s.extend([nn.Tanh(), nn.Linear(8, 3)]),
    "add_module": lambda s: s.add_module("last", nn.Tanh()),
    "add": lambda s: s.__iadd__(nn.Sequential(nn.Tanh())),
    "pop": lambda s: s.pop(2),
    "del": lambda s: s.__delitem__(1),
    "set activation": lambda s: s.__setitem__(1, nn.Tanh()),
    "set layer": lambda s: s.__setitem__(2, nn.Sequential(nn.Linear(16, 8), nn.Tanh())),
}


def pair():
    stock = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    model = copy.deepcopy(stock)
    lk.optimize(model, always=True)
    assert type(model).__name__ == "FusedSequential"
    return stock, model


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_counts(name):
    stock, model = pair()
    x = torch.randn(3, 8)
    for sequential in (stock, model):
        torch.manual_seed(0)
        EDITS[name](sequential)
    torch.testing.assert_close(model(x), stock(x))
    lk.restore(model)
    assert type(model) is nn.Sequential
    torch.testing.assert_close(model(x), stock(x))


def test_slices():
    stock, model = pair()
    x = torch.randn(3, 8)
    for part, expected in (
        (model[:2], stock[:2]),
        (model[::2], stock[::2]),
        (model[1:], stock[1:]),
    ):
        assert type(part) is nn.Sequential and list(part._modules) == list(expected._modules)
        lk.restore(part)
    torch.testing.assert_close(model[:2](x), stock[:2](x))
    torch.testing.assert_close((model + nn.Sequential(nn.Tanh()))(x), stock(x).tanh())
    torch.testing.assert_close((model * 2)(x), stock(stock(x)))
    assert model[0] is model._modules["0"] and len(model) == 3
