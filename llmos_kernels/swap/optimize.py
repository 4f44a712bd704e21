"""``optimize`` and ``restore`` assign to ``module.__class__``, or choose an attention by name.

Parameters, names, hooks, devices, optimizers and every reference to the module stay as they are.
"""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from llmos_kernels._core.numerics import shifted
from llmos_kernels.nn.frozen import Freezable, freeze, thaw
from llmos_kernels.swap import rules, timing
from llmos_kernels.swap.calls import ModelRun, ModuleCall, as_meta, captured_calls, clone
from llmos_kernels.swap.padding import (
    PaddingChanges,
    class_with_padding,
    padding_candidates,
    restore_padding,
)
from llmos_kernels.swap.rules.handwritten import HandwrittenRule, has_own_forward
from llmos_kernels.swap.rules.rule import Candidate, ModelCandidate, ancestors, first_line
from llmos_kernels.swap.summary import Entry, Report

#: The attribute of a swapped module that holds its original class.
MARK = "_llmos_swapped_from"


def optimize(
    model: nn.Module,
    verify: bool = True,
    strict: bool = False,
    *,
    inputs: tuple | Mapping | None = None,
    always: bool = False,
    freeze_weights: bool = False,
    skip_padding: bool = False,
) -> Report:
    """Swap modules of ``model`` for fused ones, in place, where they are right and not slower.

    With ``verify`` each module is compared with its replacement: outputs and gradients, in eval and
    in train mode. Both are timed side by side. A module is kept that no rule can swap safely, whose
    replacement misses its error budget, or whose replacement was measured to be slower here at any
    number of rows: in its forward and, for a module in train mode, in forward and backward
    together. Modules of one kind (class, options, shapes, dtype and inputs) are timed once. With
    ``inputs`` the whole model is timed at the end without and with the swaps. Where it is slower
    with them, the swaps that cause this are undone. The report says all this.

    The attention of a Hugging Face model is set by its ``attn_implementation``, "llmos". It is
    proved on the whole model: the outputs in eval mode are compared with those of the model's own
    eager attention, and with those of a copy in float64.

    Args:
        model: any ``torch.nn.Module``.
        verify: False swaps without proofs and times; ``inputs`` run once, to see that they fit.
        strict: raise where a module would be kept for another reason than its speed.
        inputs: a tuple of arguments of ``model``, or a mapping of keyword arguments, such as a
            dict or what a tokenizer of transformers returns. The model runs
            them up to some hundred times, in eval mode, so that each module is proved and timed on
            its real inputs. Default: random numbers, 16 rows of them for proofs, or 4 sequences of
            33 tokens, and 1 and 1024 rows for times; the whole model is not timed then.
        always: swap everything that is right, also where it is slower.
        freeze_weights: keep copies of the weights of swapped encoder layers, packed as the CPU's
            kernels read them, which makes inference on few tokens faster and takes as much memory
            again; the results are the same bits. A write that torch sees remakes a copy. One past
            torch, such as through ``weight.data`` or NumPy, cannot be seen: the layer then computes
            with the old values. ``train()`` and ``restore`` drop the copies; copies and pickles of
            the model have none.
        skip_padding: let encoders compute the tokens of a padded batch alone, in inference and in
            training: those of transformers whose attention becomes "llmos",
            ``nn.TransformerEncoder`` and ``nn.TransformerDecoder``. The hidden states that they
            return are 0 at padding. This is proved with several masks, and timed on ``inputs``. A
            batch of which something reads the padding is computed with it.

    Returns:
        A ``Report``: ``print(report)`` summarises it, ``print(report.details())`` lists every
        module.

    Raises:
        TypeError: ``model`` is no module, ``inputs`` neither a tuple nor a mapping, or a switch no
        bool.
        ValueError: ``strict`` is set, and a module would be kept for another reason than its speed;
            or ``freeze_weights`` is, and the model is in train mode.
        Exception: whatever ``model`` itself raises on ``inputs``.

        The model is unchanged after any of them.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
        >>> report = optimize(model, inputs=(torch.randn(8, 128, 64),))
    """
    check_model(model, inputs)
    options = {
        "verify": verify,
        "strict": strict,
        "always": always,
        "freeze_weights": freeze_weights,
        "skip_padding": skip_padding,
    }
    for option, given in options.items():
        if not isinstance(given, bool):
            raise TypeError(f"{option} must be a bool, got {given!r}")
    if freeze_weights and model.training:
        raise ValueError("freeze_weights is for inference, and the model is in train mode")
    models = [c for rule in rules.model_rules(model) for c in rule.candidates(model)]
    padding = padding_candidates(model) if skip_padding else []
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.inference_mode(False), torch.random.fork_rng(devices=gpus):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[i] for i in gpus),
        ):
            generator.manual_seed(shifted(0))
        run = None if inputs is None else ModelRun(model, ModuleCall.of(inputs))
        written = [m for m in model.modules() if has_own_forward(m)]
        seen = capture(model, written, run, as_meta, written)
        modules = [
            candidate
            for n, m in model.named_modules()
            if (candidate := rules.classify(m, n, ancestors(model, n), seen.get(m, ())))
        ]
        models = [c for c in models if not (c.why_not and _has_attention(c.model, modules))]
        # Their attention is chosen by name: what the matcher misses in them is no attention.
        chosen = {m for c in models if not c.why_not for m in c.model.modules()}
        modules = [
            c
            for c in modules
            if not (c.why_not and c.module in chosen and isinstance(c.rule, HandwrittenRule))
        ]
        judged = [c.model for c in models if not c.why_not]
        judged += [c.module for c in modules if not c.why_not]
        judged += [c.model for c in padding]
        objects = [c.module for c in modules if isinstance(c.rule, HandwrittenRule)]
        try:
            captured = capture(model, judged, run, with_objects=objects)
        except Exception:  # The model can run but once: its modules get example calls.
            captured = {}
        layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        needed = {m for c in padding for m in c.model.modules() if isinstance(m, layers)}
        judges = _Judges(verify, always, captured, needed)
        of_models = [judges.of_model(c) for c in models]
        # Innermost first: a module is timed with what was decided for those in it.
        decided = [(c, judges.of_module(c)) for c in reversed(modules)][::-1]
        modules = [c for c, entry in decided if entry is not None]
        report = Report(of_models + [entry for _, entry in decided if entry is not None])
        if strict and (not_swapped := [e for e in report.kept if not e.slower]):
            raise ValueError(f"modules that cannot be swapped:\n{Report(not_swapped).details()}")
        candidates: list[Candidate | ModelCandidate] = [*models, *modules]
        switches = {
            i: judges.switch(candidate)
            for i, candidate in enumerate(candidates)
            if report.entries[i].swapped
        }
        changes = None
        try:
            for switch in switches.values():
                switch.on()
            if freeze_weights:
                _freeze(model)
            if verify and run is not None and switches:
                _time_model(report, model, run, switches, search=not always)
            if freeze_weights:
                report.frozen_weights, report.frozen_bytes = _freeze(model)
            changes = PaddingChanges(padding, captured)
            if skip_padding:
                report.padding = changes.decide(model, verify, always, run)
            if strict and (not_skipped := [e for e in report.padding if e.is_wrong]):
                raise ValueError("\n".join(["padding that is computed:", *map(str, not_skipped)]))
        except BaseException:  # An interrupt leaves the model as it was, too.
            if changes is not None:
                changes.undo()
            for switch in switches.values():
                switch.off()
            _thaw(model)
            raise
    return report


def _has_attention(model: nn.Module, modules: Sequence[Candidate]) -> bool:
    """Return True if the matcher has found attention in a module of ``model``."""
    inside = set(model.modules())
    return any(s.startswith("attention") for c in modules if c.module in inside for s in c.sites)


def _freeze(model: nn.Module) -> tuple[int, int]:
    """Pack the weights of drop-ins that read copies; return how many there are, and their bytes."""
    copies = []
    for module in model.modules():
        if isinstance(module, Freezable):
            copies += freeze(module)
        else:
            thaw(module)  # A swap that was undone.
    return len(copies), sum(copy.nbytes for copy in copies)


def _thaw(model: nn.Module) -> None:
    """Drop all copies of weights, also those of modules that are no drop-ins any more."""
    for module in model.modules():
        thaw(module)


def _time_model(
    report: Report,
    model: nn.Module,
    run: ModelRun,
    switches: dict[int, timing.Switch],
    search: bool,
) -> None:
    """Add times of the whole model to ``report``, and the swaps that are undone because of them.

    ``switches`` has the switch of each swap, by the index of its entry in the report.
    """
    try:
        report.model, without = timing.of_model(model, run, list(switches.values()), search)
    except Exception as e:
        # ``inputs`` ran without error before. A later failure is reported, not raised.
        report.why_no_model = f"{type(e).__name__}: {first_line(e)}"
        return
    for i, switch in switches.items():
        if switch.group in without:
            t = without[switch.group]
            reason = f"the whole model is faster without it, {timing.span(t.before, t.after)}"
            report.entries[i] = replace(
                report.entries[i], swapped=False, reason=reason, slower=True
            )
    if not report.swapped:
        report.model = []  # Nothing is left to compare.


class _Judges:
    """Decides what becomes of each candidate.

    Args:
        verify: whether swaps are proved and timed.
        always: whether what is slower is swapped, too.
        captured: how modules were called when the user's inputs ran.
        needed: modules that are swapped although they are slower, for others to be faster.
    """

    def __init__(
        self,
        verify: bool,
        always: bool,
        captured: dict[nn.Module, list[ModuleCall]],
        needed: Collection[nn.Module] = (),
    ) -> None:
        self.verify, self.always, self.captured, self.needed = verify, always, captured, needed
        #: The drop-ins of the modules that are to be swapped.
        self.classes: dict[nn.Module, type] = {}
        #: What each module is undone together with.
        self.groups: dict[nn.Module, Hashable] = {}
        #: The times of each kind of module.
        self.timed: dict[Hashable, list[timing.Timing]] = {}

    def of_model(self, candidate: ModelCandidate) -> Entry:
        """Return what becomes of a candidate of a ``ModelRule``."""
        model = candidate.model
        self.groups[model] = candidate.shown, candidate.name
        if candidate.why_not:
            return Entry(candidate.name, candidate.shown, False, candidate.why_not)
        prove = partial(candidate.rule.prove, model, self.captured.get(model, []))
        return self._judge(candidate.name, candidate.shown, prove)

    def of_module(self, candidate: Candidate) -> Entry | None:
        """Return what becomes of a candidate of a ``Rule``; None where nothing of it is fused."""
        module, cls = candidate.module, type(candidate.module)
        if candidate.why_not:
            return Entry(candidate.name, cls.__name__, False, candidate.why_not)
        prove, always = partial(self._prove, candidate), module in self.needed
        entry = self._judge(candidate.name, cls.__name__, prove, always)
        sites = candidate.sites if entry.error is None else candidate.rule.used_sites(candidate)
        entry = replace(entry, sites=sites)
        if entry.swapped and candidate.sites and not sites:
            if not any(site.startswith("attention") for site in candidate.sites):
                return None  # Such as a sum that broadcasts, before a norm that is swapped itself.
            reason = f"no kernel takes these inputs: {candidate.sites[0]}"
            entry = replace(entry, swapped=False, reason=reason)
        if entry.swapped:
            self.classes[module] = candidate.drop_in
            self.groups.setdefault(module, (cls, candidate.drop_in))
        return entry

    def switch(self, candidate: Candidate | ModelCandidate) -> timing.Switch:
        """Return the switch of a swap, which is off yet."""
        if isinstance(candidate, ModelCandidate):
            group = self.groups[candidate.model]
            return timing.Switch(group, *candidate.rule.switch(candidate.model))
        module: Any = candidate.module
        original, drop_in = type(module), candidate.drop_in

        def on() -> None:
            module.__dict__[MARK] = original
            rules.set_class(module, drop_in)

        def off() -> None:
            module.__dict__.pop(MARK, None)
            rules.set_class(module, original)

        return timing.Switch(self.groups[module], on, off)

    def _prove(self, candidate: Candidate) -> tuple[float, list[timing.Timing]]:
        """Return the largest error over its budget, and the times of modules of its kind if any."""
        module, drop_in = candidate.module, candidate.drop_in
        captured = self.captured.get(module, [])
        calls = captured[:1] or candidate.example_calls()
        errors = [candidate.largest_error(call) for call in calls]
        error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
        kind = timing.kind(module, drop_in, self.classes, captured)
        self.groups[module] = kind
        if error <= 1 and kind not in self.timed:
            timed_calls = captured or [candidate.example_calls(s)[-1] for s in timing.SIZES]
            self.timed[kind] = timing.of_module(module, drop_in, self.classes, timed_calls)
        return error, self.timed.get(kind, [])

    def _judge(
        self,
        name: str,
        shown: str,
        prove: Callable[[], tuple[float, list[timing.Timing]]],
        always: bool = False,
    ) -> Entry:
        """Return what becomes of a candidate, by the error and the times that ``prove`` returns."""
        if not self.verify:
            return Entry(name, shown, True, "not verified")
        try:
            error, timings = prove()
        except Exception as e:  # Whatever a user's module raises is a reason to keep it.
            why = f"could not be verified: {type(e).__name__}: {first_line(e)}"
            return Entry(name, shown, False, why)
        if not error <= 1:
            return Entry(name, shown, False, "it misses the error budget", error)
        slow = next((t for t in timings if t.is_slower), None)
        if slow is None or self.always or always:
            return Entry(name, shown, True, "", error, tuple(timings))
        return Entry(name, shown, False, f"slower here, {slow}", error, tuple(timings), slower=True)


def restore(model: nn.Module) -> None:
    """Undo ``optimize``: restore the class of each module in ``model`` and each attention.

    Args:
        model: a model, or a part of one.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: another tool has changed the class of a swapped module since. The model is
        unchanged.

    Example:
        >>> report = optimize(model)
        >>> restore(model)
    """
    check_model(model)
    swapped = [(name, m) for name, m in model.named_modules() if MARK in m.__dict__]
    for name, module in swapped:
        if not rules.is_swap(class_with_padding(module), module.__dict__[MARK]):
            raise ValueError(
                f"{name or 'the model'} became a {type(module).__name__} after it was swapped:"
                " undo that first (a parametrization, or sharding)"
            )
    restore_padding(model)
    for _, module in swapped:
        rules.set_class(module, module.__dict__.pop(MARK))
    _thaw(model)
    for rule in rules.model_rules(model):
        rule.restore(model)


def check_model(model: object, inputs: object = None) -> None:
    """Raise TypeError where ``model`` is no module, or ``inputs`` no arguments for one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if inputs is not None and not isinstance(inputs, (tuple, Mapping)):
        raise TypeError(f"inputs must be a tuple or a mapping, got {type(inputs).__name__}")


def capture(
    model: nn.Module,
    modules: list[nn.Module],
    run: ModelRun | None,
    copied: Callable[[torch.Tensor], torch.Tensor] = clone,
    with_objects: Collection[nn.Module] = (),
) -> dict[nn.Module, list[ModuleCall]]:
    """Return how each of ``modules`` is called in ``run`` of ``model``; nothing without ``run``."""
    return {} if run is None else captured_calls(model, modules, run, copied, with_objects)
