"""How long a module and its drop-in take, and the whole model before and after, measured in turn."""

import statistics
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels._core.timing import interval, samples
from llmos_kernels.swap.calls import PLAIN, Call, ModelRun, evaluating
from llmos_kernels.swap.replica import replica

#: Numbers of rows at which a module is timed whose inputs are not known, as [batch, length].
SIZES = ((1, 1), (8, 128))
_ROUNDS, _SECONDS, _MOST, _REPEATS, _SURE = 15, 3e-4, 0.5, 6, 6
#: A whole model's calls are long, and few.
_MODEL_MOST = 3.0
#: What modules call their place in a model.
_PLACES = ("layer_idx", "layer_id")


@dataclass(frozen=True)
class Timing:
    """Median times of the original and of what replaces it, in seconds, at one number of ``rows``.

    ``interval`` holds the original's time over the other with 95 % confidence. ``backward``: of forward
    and backward together, for a module in train mode.
    """

    rows: int
    backward: bool
    before: float
    after: float
    interval: tuple[float, float]

    @property
    def speedup(self) -> float:
        """The original's time over the other."""
        return self.before / self.after

    @property
    def is_slower(self) -> bool:
        """Whether the replacement was measured to be slower, by more than noise."""
        return self.interval[1] < 1

    def __str__(self) -> str:
        rows = f"{self.rows} row{'s' * (self.rows != 1)}"
        return f"{rows}{', with backward' * self.backward}: {span(self.before, self.after)}"


def span(before: float, after: float) -> str:
    """Two times in one unit."""
    unit, scale = ("ms", 1e3) if min(before, after) >= 1e-3 else ("us", 1e6)
    digits = 1 if max(before, after) * scale < 100 else 0
    return f"{before * scale:.{digits}f} -> {after * scale:.{digits}f} {unit}"


def compare(
    before: Callable[[], object],
    after: Callable[[], object],
    rows: int,
    backward: bool = False,
    most: float = _MOST,
    least: int = 3,
) -> Timing:
    """Time two calls in turn, ``least`` times at least and for about ``most`` seconds, and again, up to
    ``_REPEATS`` times in all, where the replacement seems to be slower but may not be."""
    old: list[float] = []
    new: list[float] = []
    end = time.perf_counter() + _REPEATS * most
    for _ in range(_REPEATS):
        taken = samples([before, after], _ROUNDS, _SECONDS, most, least)
        old += taken[0]
        new += taken[1]
        found = timing(old, new, rows, backward)
        if found.speedup >= 1:
            break
        # Of fewer than six samples the interval is not one of 95 %.
        if len(old) >= _SURE and (found.is_slower or time.perf_counter() >= end):
            break
        least = _SURE
    return found


def timing(old: Sequence[float], new: Sequence[float], rows: int, backward: bool = False) -> Timing:
    """What two lists of samples say that were taken in turn."""
    low, high = interval([a / b for a, b in zip(old, new, strict=True)])
    return Timing(rows, backward, statistics.median(old), statistics.median(new), (low, high))


def of_module(
    module: nn.Module, drop_in: type, classes: dict[nn.Module, type], calls: Sequence[Call]
) -> list[Timing]:
    """Time ``module`` against ``drop_in`` on each call: forward, and with its backward if it is training.

    Both are copies whose inner modules have the ``classes`` that were decided for them.
    """
    old = replica(module, classes=classes, dropout=True)
    new = replica(module, classes=classes | {module: drop_in}, dropout=True)
    found = []
    for call in calls:
        with torch.inference_mode(), evaluating(old), evaluating(new):
            found.append(compare(partial(call.on, old), partial(call.on, new), call.rows))
        if module.training:
            before, after = (_step(copied.train(), module, call) for copied in (old, new))
            if before and after:
                found.append(compare(before, after, call.rows, backward=True))
    return found


def _step(copied: nn.Module, module: nn.Module, call: Call) -> Callable[[], object] | None:
    """The forward and the backward of ``copied``, by what can be trained of ``module``; None if nothing."""
    masks = [v for k, v in call.kwargs.items() if "mask" in k]

    def leaf(t: Tensor) -> Tensor:
        trained = t.is_floating_point() and not any(t is m for m in masks)
        return t.detach().requires_grad_(trained)

    leaves = call.map(leaf)
    wanted = [v for v in leaves.values if isinstance(v, Tensor) and v.requires_grad]
    # A tied parameter is two in a copy.
    named = (m.named_parameters(remove_duplicate=False) for m in (copied, module))
    for (_, p), (_, own) in zip(*named, strict=True):
        p.requires_grad_(own.requires_grad)
        wanted += [p] * own.requires_grad
    if not wanted:
        return None

    def step() -> object:
        with torch.enable_grad():
            out = leaves.on(copied)
            first = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(first.sum(), wanted, allow_unused=True)

    return step


def kind(
    module: nn.Module, drop_in: type, classes: dict[nn.Module, type], calls: Sequence[Call]
) -> Hashable:
    """What a time depends on: two modules of one kind are timed once."""

    def options(m: nn.Module) -> tuple:
        plain = {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, str, tuple))}
        return tuple(sorted((k, repr(v)) for k, v in plain.items() if k not in _PLACES))

    def form(t: Any) -> tuple:
        if isinstance(t, Tensor):
            return t.shape, t.stride(), t.dtype, t.device, t.requires_grad
        return (repr(t) if isinstance(t, PLAIN) else type(t),)

    parts = tuple((name, classes.get(m, type(m)), options(m)) for name, m in module.named_modules())
    tensors = tuple((k, *form(t)) for k, t in [*module.named_parameters(), *module.named_buffers()])
    given = tuple(form(v) for call in calls for v in call.values)
    return type(module), drop_in, parts, tensors, given


@dataclass(frozen=True)
class Switch:
    """A swap that can be turned ``on`` and ``off``, and the ``group`` of swaps that it is judged with."""

    group: Hashable
    on: Callable[[], object]
    off: Callable[[], object]


def of_model(
    model: nn.Module, run: ModelRun, switches: Sequence[Switch], search: bool
) -> tuple[list[Timing], dict[Hashable, Timing]]:
    """Time ``run`` of ``model`` with all swaps off and on: its forward and, where it is training and its
    parameters get gradients, forward and backward, in eval mode.

    With ``search``, and where the model is slower with them, the group without which it is fastest is
    turned off until it is not; those groups are returned with the model's times with and without them.
    """
    groups = dict.fromkeys(s.group for s in switches)
    without: dict[Hashable, Timing] = {}
    rows = run.call.rows
    training = model.training

    def turn(off: Collection[Hashable]) -> None:
        for switch in switches:
            (switch.off if switch.group in off else switch.on)()

    def runs(off: Collection[Hashable], backward: bool) -> Callable[[], object]:
        def turned() -> None:
            turn(off)
            run(backward)

        return turned

    def compared(backward: bool) -> Timing:
        calls = runs(groups, backward), runs(set(without), backward)
        return compare(*calls, rows, backward, _MODEL_MOST, least=1)

    try:
        with evaluating(model):
            directions = (False, True) if training and _has_backward(run) else (False,)
            found = [compared(backward) for backward in directions]
            while search and without.keys() != groups and any(t.is_slower for t in found):
                backward = next(t.backward for t in found if t.is_slower)
                left = [g for g in groups if g not in without]
                offs = [set(without), *(set(without) | {g} for g in left)]
                calls = [runs(off, backward) for off in offs]
                taken = samples(calls, _ROUNDS, _SECONDS, 2 * _MODEL_MOST, min_rounds=3)
                best = min(range(len(left)), key=lambda i: statistics.median(taken[i + 1]))
                without[left[best]] = timing(taken[0], taken[best + 1], rows, backward)
                found = [compared(backward) for backward in directions]
    finally:
        turn(set(without))
    return found, without


def _has_backward(run: ModelRun) -> bool:
    """Whether parameters get gradients; not where they are frozen, or of inference mode."""
    try:
        return run(backward=True)
    except RuntimeError:
        return False
