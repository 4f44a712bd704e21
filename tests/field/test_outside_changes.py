"""What a forward reads from outside of its module is changed after the swap."""

import copy
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import llmos_kernels as lk


class Config:
    scale = 0.5


settings = types.ModuleType("settings")
settings.SCALE = 0.5
namespace = types.SimpleNamespace(scale=0.5)
numbers = (0.5,)
tensor = torch.tensor(0.5)


def get_scale():
    return 0.5


def closure():
    """Return a way to read a variable of this function, and a way to change it."""
    value = 0.5

    def change(module):
        nonlocal value
        value = 2.0

    class Attention(nn.Module):
        def forward(self, x):
            return (x @ x.mT * value).softmax(-1) @ x

    return Attention, change


def put(name, value):
    return lambda monkeypatch: monkeypatch.setattr(sys.modules[__name__], name, value)


def attention(scale):
    """Return a class of attention whose logits are scaled by ``scale()``."""
    return type("Attention", (nn.Module,), {"forward": scale})


CASES = {
    "class": (
        attention(lambda self, x: (x @ x.mT * Config.scale).softmax(-1) @ x),
        lambda monkeypatch: monkeypatch.setattr(Config, "scale", 2.0),
    ),
    "module": (
        attention(lambda self, x: (x @ x.mT * settings.SCALE).softmax(-1) @ x),
        lambda monkeypatch: monkeypatch.setattr(settings, "SCALE", 2.0),
    ),
    "object": (
        attention(lambda self, x: (x @ x.mT * namespace.scale).softmax(-1) @ x),
        lambda monkeypatch: monkeypatch.setattr(namespace, "scale", 2.0),
    ),
    "tuple": (
        attention(lambda self, x: (x @ x.mT * numbers[0]).softmax(-1) @ x),
        put("numbers", (2.0,)),
    ),
    "tensor": (
        attention(lambda self, x: (x @ x.mT * tensor).softmax(-1) @ x),
        lambda monkeypatch: tensor.fill_(2.0),
    ),
    "function": (
        attention(lambda self, x: (x @ x.mT * get_scale()).softmax(-1) @ x),
        put("get_scale", lambda: 2.0),
    ),
    "closure": closure(),
}


@pytest.mark.parametrize("name", CASES)
def test_the_new_value_is_used(name, monkeypatch):
    cls, change = CASES[name]
    stock, x = cls(), torch.randn(2, 9, 32)
    ours = copy.deepcopy(stock)
    assert lk.optimize(ours, inputs=(x,), always=True).sites()
    before = ours(x)
    torch.testing.assert_close(before, stock(x))
    change(monkeypatch)
    torch.testing.assert_close(ours(x), stock(x))
    assert not torch.allclose(ours(x), before)
    if name == "tensor":
        tensor.fill_(0.5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.calls = nn.Linear(32, 32), 0
        self.q.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def forward(self, x):
        return (self.q(x) @ x.mT).softmax(-1) @ x


class Checkpointed(Attention):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_checkpointed_layers_are_computed_again():
    x = torch.randn(2, 9, 32, requires_grad=True)
    model = Checkpointed()
    report = lk.optimize(model, inputs=(x.detach(),), always=True)
    assert any("torch.utils.checkpoint" in e.reason for e in report.kept)
    model.calls = 0
    model(x).sum().backward()
    assert model.calls == 2


class Protected(Attention):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return super().forward(x)


def test_code_that_is_protected_from_autocast_stays_so():
    x = torch.randn(2, 9, 32)
    stock, ours = Protected(), Protected()
    ours.load_state_dict(stock.state_dict())
    lk.optimize(ours, inputs=(x,), always=True)
    with torch.autocast("cpu"):
        assert ours(x).dtype == torch.float32
        torch.testing.assert_close(ours(x), stock(x))
