"""Rules of ``optimize``: one is added in a few lines, and a module is classified once."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import llmos_kernels as lk
from llmos_kernels.swap import rules
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.rules import rms_norm
from llmos_kernels.swap.rules.rule import Rule, example_rows

pytestmark = pytest.mark.usefixtures("one_thread")


class Double(nn.Module):
    def forward(self, x):
        return x + x


class FusedDouble(Double):
    def forward(self, x):
        return 2 * x


class DoubleRule(Rule):
    classes: ClassVar = {Double: FusedDouble}

    def example_calls(self, candidate, size=None):
        return [ModuleCall((torch.randn(example_rows(size), 8),))]


def test_a_rule_is_added(monkeypatch):
    monkeypatch.setattr(rules, "RULES", [*rules.RULES, DoubleRule()])
    model, x = nn.Sequential(nn.LayerNorm(8), Double()), torch.randn(3, 8)
    before = model(x)
    report = lk.optimize(model, always=True)
    assert [e.cls for e in report.swapped] == ["LayerNorm", "Double"] and not report.kept
    assert report.entries[1].error <= 1 and report.entries[1].timings
    assert type(model[1]) is FusedDouble
    torch.testing.assert_close(model(x), before)
    lk.restore(model)
    assert type(model[1]) is Double and torch.equal(model(x), before)


def test_a_wrong_drop_in_is_kept(monkeypatch):
    monkeypatch.setattr(rules, "RULES", [*rules.RULES, DoubleRule()])
    monkeypatch.setattr(FusedDouble, "forward", lambda self, x: 2.001 * x)
    (entry,) = lk.optimize(Double(), always=True).entries
    assert entry.reason == "it misses the error budget" and entry.error > 1


def test_a_subclass_of_what_a_rule_knows_is_kept(monkeypatch):
    monkeypatch.setattr(rules, "RULES", [*rules.RULES, DoubleRule()])
    (entry,) = lk.optimize(type("Other", (Double,), {})(), always=True).entries
    assert entry.reason == "Other is a subclass of Double and may compute something else"


class RMSNorm(nn.Module):
    """An RMS norm of a model. It counts how often it runs."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def __call__(self, x):
        RMSNorm.runs += 1
        return super().__call__(x)

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def test_a_module_is_classified_once(monkeypatch):
    """An RMS norm runs six times to be recognised: on three sizes of input, in both modes."""
    recognised = []
    find = rms_norm.epsilon_name
    monkeypatch.setattr(rms_norm, "epsilon_name", lambda m: (recognised.append(m), find(m))[1])
    monkeypatch.setattr(RMSNorm, "runs", 0)
    model = nn.ModuleList([RMSNorm()])
    assert lk.optimize(model, verify=False).swapped
    assert RMSNorm.runs == 6 and recognised.count(model[0]) == 1
    lk.restore(model)
    recognised.clear()
    assert lk.optimize(model, always=True).swapped
    assert recognised.count(model[0]) == 1
