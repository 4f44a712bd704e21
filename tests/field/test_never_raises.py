"""Whatever a user's class does, ``optimize`` and ``quantize`` keep it with a reason.

After TylerYep/torchinfo #117 (lazy modules) and classes that know of their subclasses.
"""

import copy

import pytest
import torch
from torch import nn

import llmos_kernels as lk

D = 16
LAZY = {
    "alone": lambda: nn.LazyLinear(8),
    "first": lambda: nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 8)),
    "last": lambda: nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.LazyLinear(8)),
    "beside": lambda: nn.Sequential(nn.LayerNorm(D), nn.LazyLinear(8)),
}


@pytest.mark.parametrize("tool", [lk.optimize, lk.quantize])
@pytest.mark.parametrize("name", LAZY)
def test_lazy_modules(name, tool):
    model = LAZY[name]()
    report = tool(model)
    lazy = [e for e in report.entries if "run the model once" in e.reason]
    assert lazy or tool is lk.quantize
    assert model(torch.randn(4, D)).shape == (4, 8)


class Feeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Registered(Feeds):
    """Wants an argument of each subclass, and remembers them."""

    known: list = []  # noqa: RUF012

    def __init_subclass__(cls, *, name, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.known.append(name)


class OfOneClass(Feeds):
    """Minds what is set, how it is made and how its mode is changed."""

    def __new__(cls, name):
        return super().__new__(cls)

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __setattr__(self, name, value):
        if name in ("__class__", "training") and "name" in vars(self):
            raise TypeError(f"{name} is set once")
        super().__setattr__(name, value)

    def train(self, mode=True):
        raise RuntimeError("it was trained already")


class WithoutClass(Feeds):
    """Says that it is of another class, which nothing can change."""

    __class__ = property(lambda self: Feeds)


class Final(type):
    """A metaclass whose classes have no subclasses."""

    def __new__(cls, name, bases, members):
        if any(isinstance(base, Final) for base in bases):
            raise TypeError(f"{bases[-1].__name__} is final")
        return super().__new__(cls, name, bases, members)


class FinalFeeds(Feeds, metaclass=Final):
    pass


class NoSignature(Feeds):
    forward = property(lambda self: 1 / 0)


def test_classes_that_mind_their_subclasses():
    model = Registered()
    expected, x = copy.deepcopy(model), torch.randn(3, D)
    assert lk.optimize(model, always=True).swapped
    assert not Registered.known and type(model).__name__ == "FusedRegistered"
    torch.testing.assert_close(model(x), expected(x))


def test_classes_that_mind_what_is_set():
    model, x = OfOneClass("a"), torch.randn(3, D)
    expected = model(x)
    assert lk.optimize(model, always=True).swapped
    assert type(model).__name__ == "FusedOfOneClass" and model.training
    torch.testing.assert_close(model(x), expected)
    lk.restore(model)
    assert type(model) is OfOneClass


def test_a_class_that_cannot_be_changed_is_kept():
    model = nn.Sequential(WithoutClass(), nn.LayerNorm(D))
    report = lk.optimize(model, always=True)
    assert type(model[0]) is WithoutClass and type(model[1]) is lk.nn.LayerNorm
    (reason,) = [e.reason for e in report.entries if e.module == "0"]
    assert reason.startswith("its class cannot be changed")


@pytest.mark.parametrize("cls", [FinalFeeds, NoSignature])
def test_what_cannot_be_examined_is_kept(cls):
    model = nn.Sequential(cls(), nn.LayerNorm(D))
    report = lk.optimize(model, always=True)
    assert type(model[0]) is cls and type(model[1]) is lk.nn.LayerNorm
    found = [e.reason for e in report.entries if e.module == "0"]
    assert all(reason.startswith("could not be examined") for reason in found)
