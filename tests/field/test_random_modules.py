"""Models composed at random: a swapped one does what the stock one does, whatever that is.

Equal are outputs, gradients, text, calls of hooks, the state left behind, signatures and the state
dict; also after the model is edited. What cannot be swapped is kept with a reason, and nothing
raises but what the stock model raises, too.
"""

import inspect

import hypothesis
import torch
from observed_runs import CALLS, differences, run
from random_edits import edit
from random_modules import build, initial
from random_plans import plans
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

import llmos_kernels as lk
from llmos_kernels._core import numerics
from llmos_kernels.swap.optimize import MARK

settings = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=not numerics.shift,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)
#: Classes of which a user expects that they are swapped, or to read why not.
KNOWN = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    LazyModuleMixin,
)


def signature(module):
    """Return names, kinds and defaults of the parameters of a module's forward."""
    found = inspect.signature(module.forward).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


def optimize(plan, model, world, capsys):
    """Return the report. ``inputs`` run the model, so what that left behind is taken away."""
    lazy = any(part.kind == "lazy" for part in plan.parts)
    inputs = (torch.randn(2, 5, 16),) if plan.with_inputs and not lazy else None
    capsys.readouterr()
    before = {m: dict(vars(m)) for m in model.modules()}
    try:
        report = lk.optimize(model, inputs=inputs, always=True)
    except Exception:
        if inputs is None or "error" not in run(*build(plan), "eval"):
            raise
        report = lk.optimize(model, always=True)
    if inputs is None:
        assert not world.events and not capsys.readouterr().out, "a probe ran the user's code"
    for module in model.modules():
        for name, value in initial().items():
            if name in before[module]:
                vars(module)[name] = value
        if "meter" in before[module]:
            module.meter.count = 0
        vars(module).pop("hidden", None) if "hidden" not in before[module] else None
    return report


def assert_kept_with_reasons(stock, model, report):
    reasons = {e.module: e.reason for e in report.kept}
    assert all(reasons.values())
    swapped = {e.module for e in report.swapped}
    for name, module in model.named_modules():
        assert (MARK in vars(module)) == (name in swapped), name
    for name, module in stock.named_modules():
        if isinstance(module, KNOWN):
            assert name in swapped or name in reasons, f"{name}: {type(module).__name__}"


def assert_same(stock, model, hooks=False, calls=CALLS):
    assert list(model[0].state_dict()) == list(stock[0].state_dict())
    for (name, old), (_, new) in zip(
        stock[0].named_modules(), model[0].named_modules(), strict=True
    ):
        assert signature(new) == signature(old), name
    for call in calls:
        expected = run(*stock, call, hooks)
        found = run(*model, call, hooks)
        if "error" in expected:
            assert "error" in found, f"{call}: nothing was raised, but {expected['error']}"
            continue
        half = any(p.dtype == torch.bfloat16 for p in stock[0].parameters())
        wrong = list(differences(found, expected, 0.1 if half else 1e-4))
        assert not wrong, f"{call}: {wrong}"


@settings
@hypothesis.given(plan=plans)
def test_random_modules(plan, untimed, capsys):
    stock, model = build(plan), build(plan)
    report = optimize(plan, *model, capsys)
    assert_kept_with_reasons(stock[0], model[0], report)
    assert_same(stock, model, plan.global_hooks)
    hooks = False
    for how, at in plan.edits:
        hooks |= how == "global hooks"
        outcomes = []
        for i, (module, world) in enumerate((stock, model)):
            try:
                edited = edit(module, world, how, at)
            except Exception as e:
                outcomes.append(type(e))
            else:
                outcomes.append(None)
                stock, model = ((edited, world), model) if i == 0 else (stock, (edited, world))
        assert outcomes[0] == outcomes[1], how
        assert_same(stock, model, hooks, ("train", "eval", "many"))
    lk.restore(model[0])
    classes = [[type(m).__name__ for m in whole.modules()] for whole, _ in (stock, model)]
    assert classes[0] == classes[1]
    assert_same(stock, model, hooks, ("train", "eval"))
