"""``optimize`` and ``restore``: a swap is an assignment to ``module.__class__``.

Parameters, names, hooks, devices, optimizers and every reference to the module stay as they are.
"""

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from llmos_kernels._core.numerics import shifted
from llmos_kernels.swap import pretrained, proof, rules, timing
from llmos_kernels.swap.calls import Call, ModelRun, captured_calls, example_calls
from llmos_kernels.swap.report import Entry, Report

MARK = "_llmos_swapped_from"


def optimize(
    model: nn.Module,
    verify: bool = True,
    strict: bool = False,
    *,
    inputs: tuple | dict | None = None,
    always: bool = False,
) -> Report:
    """Swap what is right and not slower in ``model``, in place, each swap proved; ``restore`` undoes it.

    With ``verify`` each module is compared to its replacement, outputs and gradients, in eval and in train
    mode, and both are timed side by side. A module stays that no rule can swap safely, whose replacement
    misses its error budget, or whose replacement was measured to be slower here at any number of rows: in
    its forward and, for a module in train mode, in forward and backward together. Modules of one shape are
    timed once. At the end the whole model is timed before and after; where it became slower though its
    parts did not, the part that is to blame stays. The report says all this.

    The attention of a Hugging Face model is chosen by name, "llmos", and proved on the whole model:
    its outputs in eval mode against its own eager attention and a copy in float64.

    Args:
        model: any ``torch.nn.Module``.
        verify: False proves and times nothing.
        strict: raise where a module would be kept for another reason than its speed, the model unchanged.
        inputs: a tuple of arguments of ``model``, or a dict of keyword arguments. The model runs them up to
            some hundred times, in eval mode, so that each module is proved and timed on what it really gets. Without,
            random numbers are used, 16 rows of them for proofs, 1 and 1024 rows for times, and the whole
            model is not timed.
        always: swap all that is right, also where it is slower.

    Returns:
        A ``Report``: ``print(report)`` summarises it, ``print(report.details())`` lists every module.

    Raises:
        TypeError: ``model`` is no module, ``inputs`` neither a tuple nor a dict, or a switch no bool.
        ValueError: ``strict``, and a module would be kept.
        Exception: whatever ``model`` itself raises on ``inputs``. It is unchanged then.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
        >>> report = optimize(model, inputs=(torch.randn(8, 128, 64),))
    """
    check_model(model, inputs)
    for option, given in {"verify": verify, "strict": strict, "always": always}.items():
        if not isinstance(given, bool):
            raise TypeError(f"{option} must be a bool, got {given!r}")
    plan = [(name, m, rules.why_not(m, around)) for name, m, around in _candidates(model)]
    models = [
        (name, m, pretrained.why_not(m, around(model, name)))
        for name, m in pretrained.candidates(model)
    ]
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.inference_mode(False), torch.random.fork_rng(devices=gpus):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[i] for i in gpus),
        ):
            generator.manual_seed(shifted(0))
        run = None if inputs is None else ModelRun(model, Call.of(inputs))
        judges = _Judges(
            verify, always, capture(model, [m for _, m, why in plan + models if not why], run)
        )
        chosen = [judges.of_attention(*named) for named in models]
        # Innermost first: a module is timed with what was decided for those in it.
        entries = [judges.of_module(*named) for named in reversed(plan)][::-1]
        report = Report(chosen + entries)
        if strict and (kept := [e for e in report.kept if not e.slower]):
            raise ValueError(f"modules that cannot be swapped:\n{Report(kept).details()}")
        switches = {}
        for i, (entry, (_, module, _)) in enumerate(
            zip(report.entries, models + plan, strict=True)
        ):
            if entry.swapped:
                switches[i] = _switch(module, pretrained_model=i < len(models), judges=judges)
        try:
            for switch in switches.values():
                switch.on()
            if verify and run is not None and switches:
                _time_model(report, model, run, switches, search=not always)
        except BaseException:  # Ctrl-C: the model as it was.
            for switch in switches.values():
                switch.off()
            raise
    return report


def _switch(module: Any, pretrained_model: bool, judges: "_Judges") -> timing.Switch:
    """The swap of one module, which is off yet."""
    group = judges.groups[module]
    if pretrained_model:
        return timing.Switch(group, *pretrained.switch(module))
    original, drop_in = type(module), judges.classes[module]

    def on() -> None:
        module.__dict__[MARK] = original
        module.__class__ = drop_in

    def off() -> None:
        module.__dict__.pop(MARK, None)
        module.__class__ = original

    return timing.Switch(group, on, off)


def _time_model(
    report: Report,
    model: nn.Module,
    run: ModelRun,
    switches: dict[int, timing.Switch],
    search: bool,
) -> None:
    """Add the whole model's times to ``report``, and what was turned off for their sake."""
    try:
        report.model, without = timing.of_model(model, run, list(switches.values()), search)
    except Exception as e:  # It ran once. What it raises now is no reason to fail.
        report.why_no_model = f"{type(e).__name__}: {_first_line(e)}"
        return
    for i, switch in switches.items():
        if switch.group in without:
            t = without[switch.group]
            reason = f"the whole model is faster without it, {timing.span(t.before, t.after)}"
            report.entries[i] = replace(
                report.entries[i], swapped=False, reason=reason, slower=True
            )


class _Judges:
    """What to do with each candidate, with what was found of those before it."""

    def __init__(self, verify: bool, always: bool, captured: dict):
        self.verify, self.always, self.captured = verify, always, captured
        self.classes: dict[nn.Module, type] = {}  # Of modules that are to be swapped.
        self.groups: dict[nn.Module, Hashable] = {}
        self.timed: dict[Hashable, list[timing.Timing]] = {}

    def of_attention(self, name: str, model: Any, why: str) -> Entry:
        """Of the attention of a Hugging Face model."""
        self.groups[model] = "attention", name
        prove = partial(pretrained.prove, model, self.captured.get(model, []))
        return self._judge(name, f"attention of {type(model).__name__}", why, prove)

    def of_module(self, name: str, module: nn.Module, why: str) -> Entry:
        """Of a module that a rule knows."""
        if why:
            return Entry(name, type(module).__name__, False, why)
        drop_in = rules.drop_in(module)
        prove = partial(self._prove, module, drop_in)
        entry = self._judge(name, type(module).__name__, "", prove)
        if entry.swapped:
            self.classes[module] = drop_in
            self.groups.setdefault(module, (type(module), drop_in))
        return entry

    def _prove(self, module: nn.Module, drop_in: type) -> tuple[float, list[timing.Timing]]:
        captured = self.captured.get(module, [])
        errors = [
            proof.largest_error(module, drop_in, c) for c in captured[:1] or example_calls(module)
        ]
        error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
        kind = timing.kind(module, drop_in, self.classes, captured)
        self.groups[module] = kind
        if error <= 1 and kind not in self.timed:
            sized = captured or [example_calls(module, s)[-1] for s in timing.SIZES]
            self.timed[kind] = timing.of_module(module, drop_in, self.classes, sized)
        return error, self.timed.get(kind, [])

    def _judge(
        self, name: str, shown: str, why: str, prove: Callable[[], tuple[float, list]]
    ) -> Entry:
        """What to do with one candidate, by the error and the times that ``prove`` finds."""
        if why:
            return Entry(name, shown, False, why)
        if not self.verify:
            return Entry(name, shown, True, "not verified")
        try:
            error, timings = prove()
        except Exception as e:  # Whatever a user's module raises is a reason to keep it.
            why = f"could not be verified: {type(e).__name__}: {_first_line(e)}"
            return Entry(name, shown, False, why)
        if not error <= 1:
            return Entry(name, shown, False, "it misses the error budget", error)
        slow = next((t for t in timings if t.is_slower), None)
        if slow is None or self.always:
            return Entry(name, shown, True, "", error, tuple(timings))
        return Entry(name, shown, False, f"slower here, {slow}", error, tuple(timings), slower=True)


def _first_line(e: Exception) -> str:
    return next(iter(str(e).splitlines()), "")


def restore(model: nn.Module) -> None:
    """Give every module that ``optimize`` swapped in ``model`` its class or its attention back.

    Raises ValueError, the model unchanged, where another tool has changed such a class since.
    """
    check_model(model)
    swapped = [(name, m) for name, m in model.named_modules() if MARK in m.__dict__]
    for name, module in swapped:
        if not rules.is_swap(module, module.__dict__[MARK]):
            raise ValueError(
                f"{name or 'the model'} became a {type(module).__name__} after it was swapped:"
                " undo that first (a parametrization, or sharding)"
            )
    for _, module in swapped:
        module.__class__ = module.__dict__.pop(MARK)
    pretrained.restore(model)


def check_model(model, inputs=None) -> None:
    """Raises TypeError where ``model`` is no module, or ``inputs`` no arguments for one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if inputs is not None and not isinstance(inputs, (tuple, dict)):
        raise TypeError(f"inputs must be a tuple or a dict, got {type(inputs).__name__}")


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Each module that a rule knows, once: name, module, the modules around it."""
    for name, module in model.named_modules():
        if rules.is_candidate(module):
            yield name, module, around(model, name)


def around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that ``name`` lies in, outermost first."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def capture(
    model: nn.Module, modules: list[nn.Module], run: ModelRun | None
) -> dict[nn.Module, list[Call]]:
    """How each of ``modules`` is called when ``model`` runs its inputs; empty without them."""
    return {} if run is None else captured_calls(model, modules, run)
