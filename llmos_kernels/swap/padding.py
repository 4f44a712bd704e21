"""``optimize(skip_padding=True)``: whole models that compute the tokens of padded batches alone.

The modules that change get another class, after all other swaps and on top of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmos_kernels.swap import timing
from llmos_kernels.swap.calls import ModelRun, ModuleCall, evaluating
from llmos_kernels.swap.rules import set_class
from llmos_kernels.swap.rules.rule import first_line
from llmos_kernels.swap.summary import Padding

#: The attribute of a changed module that holds the class it had before.
_MARK = "_llmos_class_with_padding"
#: What loads the rule of a library, by the module and the name of the library's base class.
_LOADERS: dict[tuple[str, str], Callable[[], "PaddingRule"]] = {}

Change = dict[nn.Module, type]


class CannotSkipError(ValueError):
    """A model cannot leave out its padding; the message is the reason."""


class PaddingCandidate(NamedTuple):
    """One model that a ``PaddingRule`` knows.

    Args:
        name: its name in the model that is optimized; empty for that model itself.
        model: the model.
        rule: the rule that knows it.
        why_not: why it has to compute padding, or an empty string.
    """

    name: str
    model: nn.Module
    rule: "PaddingRule"
    why_not: str = ""


class PaddingRule(ABC):
    """How models of one kind leave out their padding, and how that is proved."""

    @abstractmethod
    def candidates(self, model: nn.Module) -> Iterator[PaddingCandidate]:
        """Yield the models in ``model`` that compute padding, with why they have to if so."""

    @abstractmethod
    def change(
        self, model: nn.Module, captured: list[ModuleCall], verify: bool, is_whole: bool
    ) -> tuple[float | None, Change]:
        """Return the largest error over its budget, and the new class of each module that changes.

        Args:
            model: the model of a candidate.
            captured: how it was called when the user's inputs ran; empty without such inputs.
            verify: whether it is proved; else the error is None.
            is_whole: whether the model is all that is optimized: nothing around it reads its
                results.

        Raises:
            CannotSkipError: the model cannot be changed.
        """

    def switch(self, model: nn.Module) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return what else has to be done before classes change, and what undoes it."""
        return (lambda: None), (lambda: None)

    @abstractmethod
    def is_token(self, model: nn.Module, call: ModuleCall) -> Tensor | None:
        """Return bool [batch, length], True where a call has tokens; None if it does not say."""


def register_padding_rule(module: str, name: str, load: Callable[[], PaddingRule]) -> None:
    """Add the rule for models with a base class, which is not imported before there is one.

    Args:
        module: the module that defines the base class.
        name: its name.
        load: imports and returns the rule.
    """
    _LOADERS[module, name] = load


def padding_candidates(model: nn.Module) -> list[PaddingCandidate]:
    """Return what the rules say of the models in ``model``."""
    bases = {(c.__module__, c.__name__) for m in model.modules() for c in type(m).__mro__}
    loads = dict.fromkeys(load for base, load in _LOADERS.items() if base in bases)
    return [c for load in loads for c in load().candidates(model)]


def skips_padding(module: nn.Module) -> bool:
    """Return whether a module in ``module`` has the class of one that skips padding."""
    return any(_MARK in m.__dict__ for m in module.modules())


def class_with_padding(module: nn.Module) -> type:
    """Return the class of ``module``, or the one it had before it skipped padding."""
    return module.__dict__.get(_MARK, type(module))


def restore_padding(model: nn.Module) -> None:
    """Let every module inside ``model`` compute padding again."""
    for module in model.modules():
        if _MARK in module.__dict__:
            set_class(module, module.__dict__.pop(_MARK))


class PaddingChanges:
    """Decides which candidates leave out their padding, and lets them.

    Args:
        candidates: of ``padding_candidates``.
        captured: how modules were called when the user's inputs ran.
    """

    def __init__(
        self, candidates: Sequence[PaddingCandidate], captured: dict[nn.Module, list[ModuleCall]]
    ) -> None:
        self.candidates, self.captured = candidates, captured
        self._switches: list[timing.Switch] = []

    def decide(
        self, model: nn.Module, verify: bool, always: bool, run: ModelRun | None
    ) -> list[Padding]:
        """Change what is right and not slower; return what became of each candidate.

        Args:
            model: the model that is optimized, with its other swaps.
            verify: whether changes are proved and timed.
            always: whether what is slower is changed, too.
            run: runs the model on the user's inputs, if there are any.
        """
        if not self.candidates:
            cls = type(model).__name__
            if skips_padding(model):
                return [Padding("", cls, skipped=True, reason="already")]
            return [Padding("", cls, reason="it has no encoder of transformers or torch")]
        return [self._judged(c, verify, always, model, run) for c in self.candidates]

    def undo(self) -> None:
        """Undo all changes."""
        for switch in self._switches:
            switch.off()
        self._switches.clear()

    def _judged(
        self,
        candidate: PaddingCandidate,
        verify: bool,
        always: bool,
        model: nn.Module,
        run: ModelRun | None,
    ) -> Padding:
        rule = candidate.rule
        calls = self.captured.get(candidate.model, [])
        masks = [m for c in calls if (m := rule.is_token(candidate.model, c)) is not None]
        positions = sum(m.numel() for m in masks)
        fill = sum(int(m.sum()) for m in masks) / positions if positions else None
        kept = Padding(candidate.name, type(candidate.model).__name__, fill=fill)
        if fill == 1 and verify and not always:
            return replace(kept, reason="inputs have no padding")
        if candidate.why_not:
            return replace(kept, reason=candidate.why_not)
        try:
            is_whole = candidate.model is model
            error, change = rule.change(candidate.model, calls, verify, is_whole)
        except Exception as e:  # Whatever a user's model raises is a reason to keep it.
            why = first_line(e) or type(e).__name__
            shown = why if isinstance(e, CannotSkipError) else f"{type(e).__name__}: {why}"
            return replace(kept, reason=shown)
        kept = replace(kept, error=error)
        if error is not None and not error <= 1:
            return replace(kept, reason="it misses the error budget")
        switch = self._switch(candidate, change)
        self._switches.append(switch)
        if not verify or run is None:
            switch.on()
            return replace(kept, skipped=True)
        if not is_whole and _differs(model, run, switch, masks):
            return replace(kept, reason="what is around it reads padded positions")
        timings, without = timing.of_model(model, run, [switch], search=not always)
        kept = replace(kept, timings=tuple(timings))
        if without:
            return replace(kept, reason=f"slower here, {timings[0]}", slower=True)
        return replace(kept, skipped=True)

    def _switch(self, candidate: PaddingCandidate, change: Change) -> timing.Switch:
        before = {m: type(m) for m in change}
        rule = candidate.rule
        prepare, back = rule.switch(candidate.model)

        def on() -> None:
            prepare()
            for module, cls in change.items():
                module.__dict__[_MARK] = before[module]
                set_class(module, cls)

        def off() -> None:
            for module, cls in before.items():
                module.__dict__.pop(_MARK, None)
                set_class(module, cls)
            back()

        return timing.Switch(candidate.name, on, off)


def _differs(
    model: nn.Module, run: ModelRun, switch: timing.Switch, masks: Sequence[Tensor]
) -> bool:
    """Return whether a model returns other values with a switch on: not of rounding, at tokens.

    The switch is off then. ``masks`` are those of tokens in its inputs.
    """

    def results() -> list[Tensor]:
        with evaluating(model):
            found = run.results()
        return [_at_tokens(t, masks) for t in found]

    before = results()
    switch.on()
    try:
        after = results()
    finally:
        switch.off()
    pairs = zip(before, after, strict=True)
    return len(before) != len(after) or not all(_is_close(b, a) for b, a in pairs)


def _at_tokens(result: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Return a result at tokens, if it has a place for each position of one of the masks."""
    for mask in masks:
        for is_token in (mask, mask.T):
            if result.shape[:2] == is_token.shape:
                return result[is_token]
    return result


def _is_close(before: Tensor, after: Tensor) -> bool:
    """Return whether two results are equal but for rounding; what reads padding differs by more."""
    if before.shape != after.shape:
        return False
    scale = before.nan_to_num(0.0).abs().max() if before.numel() else 0.0
    limit = max(1e-3, 8 * torch.finfo(before.dtype).eps) * float(scale)
    return torch.allclose(before, after, rtol=0.0, atol=limit, equal_nan=True)
