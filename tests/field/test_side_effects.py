"""What a forward does besides returning a tensor is not lost: such a module is kept.

After transformers #1451 and torch hooks that read ``module.hidden``.
"""

import pytest
import torch
from torch import nn
from torch.profiler import record_function

import llmos_kernels as lk

pytestmark = pytest.mark.usefixtures("untimed")

D = 16
COUNTS = {"calls": 0}
SEEN = []


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)
        self.calls, self.log, self.hidden = 0, [], None

    def body(self, x):
        return self.down(self.act(self.up(x)))


class SetsAttribute(FeedForward):
    def forward(self, x):
        self.hidden = self.up(x)
        return self.down(self.act(self.hidden))


class Counts(FeedForward):
    def forward(self, x):
        self.calls += 1
        return self.body(x)


class Appends(FeedForward):
    def forward(self, x):
        self.log.append("called")
        return self.body(x)


class CountsElsewhere(FeedForward):
    def forward(self, x):
        COUNTS["calls"] += 1
        return self.body(x)


class Remembers(FeedForward):
    def forward(self, x):
        SEEN.append(1)
        return self.body(x)


class Prints(FeedForward):
    def forward(self, x):
        print("forward")
        return self.body(x)


class Profiles(FeedForward):
    def forward(self, x):
        with record_function("feed forward"):
            return self.body(x)


class Meter:
    def __init__(self):
        self.count = 0

    def tick(self):
        self.count += 1


class CountsInAnObject(FeedForward):
    def __init__(self):
        super().__init__()
        self.meter = Meter()

    def forward(self, x):
        self.meter.tick()
        return self.body(x)


class CountsInADict(FeedForward):
    def __init__(self):
        super().__init__()
        self.meters = {"one": Meter()}

    def forward(self, x):
        self.meters["one"].tick()
        return self.body(x)


class AddsToASet(FeedForward):
    def __init__(self):
        super().__init__()
        self.lengths = set()

    def forward(self, x):
        self.lengths.add(len(x))
        return self.body(x)


class CallsBack(FeedForward):
    def __init__(self):
        super().__init__()
        self.callback = lambda: SEEN.append(1)

    def forward(self, x):
        self.callback()
        return self.body(x)


class CallsBackByName(CallsBack):
    def forward(self, x):
        getattr(self, "callback")()  # noqa: B009
        return self.body(x)


class SetsByMethod(FeedForward):
    def forward(self, x):
        self.__setattr__("hidden", x)
        return self.body(x)


class OfItsBase(Counts):
    def forward(self, x):
        return super().forward(x)


class InAStaticMethod(FeedForward):
    @staticmethod
    def note():
        print("forward")

    @classmethod
    def remember(cls):
        SEEN.append(1)

    def forward(self, x):
        self.note()
        return self.body(x)


class InAClassMethod(InAStaticMethod):
    def forward(self, x):
        self.remember()
        return self.body(x)


class Activation(nn.GELU):
    def note(self):
        print("forward")


class InAMethodOfAChild(FeedForward):
    def __init__(self):
        super().__init__()
        self.act = Activation()

    def forward(self, x):
        self.act.note()
        return self.body(x)


class InAMethod(FeedForward):
    def forward(self, x):
        return self.noted(x)

    def noted(self, x):
        self.calls += 1
        return self.body(x)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps, self.calls = nn.Parameter(torch.ones(D)), 1e-6, 0

    def forward(self, x):
        self.calls += 1
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(D, D), nn.Dropout(0.1), nn.LayerNorm(D)
        self.log = []

    def forward(self, x, residual):
        self.log.append(1)
        return self.norm(self.dropout(self.dense(x)) + residual)


class Plain(FeedForward):
    def forward(self, x):
        return self.body(x)


def test_side_effects_are_not_lost(capsys):
    kinds = (SetsAttribute, Counts, Appends, CountsElsewhere, Remembers, Prints, Profiles)
    x = torch.randn(3, D)
    kinds += (CountsInAnObject, CountsInADict, AddsToASet, CallsBack, CallsBackByName)
    kinds += (SetsByMethod, OfItsBase, InAStaticMethod, InAClassMethod, InAMethodOfAChild)
    for cls in (*kinds, InAMethod, Norm):
        module = cls().eval()
        lk.optimize(module, always=True)
        assert type(module) is cls, cls.__name__
        if hasattr(module, "log"):
            assert (module.calls, module.log, module.hidden) == (0, [], None)  # No probe ran it.
        assert not capsys.readouterr().out and not SEEN and not COUNTS["calls"]
        module(x)
        SEEN.clear()
        COUNTS["calls"] = 0
        capsys.readouterr()
    module = Residual().eval()
    report = lk.optimize(module, always=True)
    (entry,) = [e for e in report.entries if not e.module]
    assert entry.reason == "its forward calls append" and module.log == []
    module = Plain().eval()
    lk.optimize(module, always=True)
    assert type(module) is not Plain


class CountingGELU(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return nn.functional.gelu(x)


class CalledGELU(nn.Module):
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return super().__call__(x)

    def forward(self, x):
        return nn.functional.gelu(x)


def test_activations_with_side_effects_are_called():
    for make in (CountingGELU, CalledGELU):
        act, plain = make(), Plain()
        plain.act = act
        for model in (nn.Sequential(nn.Linear(D, 32), act, nn.Linear(32, D)), plain):
            act.calls = 0
            lk.optimize(model, always=True)
            assert act.calls == 0
            model(torch.randn(3, D))
            assert act.calls == 1


class OwnGELU(nn.Module):
    def __init__(self):
        super().__init__()
        self.function = nn.functional.gelu

    def forward(self, x):
        return self.function(x)


def test_a_function_of_torch_on_an_instance_has_no_effect():
    model = nn.Sequential(nn.Linear(D, 32), OwnGELU(), nn.Linear(32, D))
    lk.optimize(model, always=True)
    assert type(model).__name__ == "FusedSequential"
