"""Times of a module against its drop-in, and of a whole model before and after."""

import statistics
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels._core.timing import interval, samples
from llmos_kernels.swap.calls import PLAIN, ModelRun, ModuleCall, evaluating, set_training
from llmos_kernels.swap.replica import replica

#: Batch size and sequence length of the calls on which a module is timed whose inputs are not
#: known.
SIZES = ((1, 1), (8, 128))
#: A measurement is of so many rounds, and a round of one function takes at least so many seconds.
_ROUNDS, _ROUND_SECONDS = 15, 3e-4
#: About how long one measurement takes, of a module and of a whole model.
_MODULE_SECONDS, _MODEL_SECONDS = 0.5, 3.0
#: How often a measurement may be repeated, and how many samples an interval of 95 % takes.
_MAX_REPEATS, _MIN_SAMPLES = 6, 6
#: Attributes that hold the place of a module in its model. No time depends on them.
_PLACES = ("layer_idx", "layer_id")


@dataclass(frozen=True)
class Timing:
    """Times of an original and of its replacement, at one number of rows.

    Of a swap that is undone because the whole model is faster without it, the original is the model
    with that swap.

    Args:
        rows: the number of rows of the input.
        backward: whether forward and backward were timed together, else the forward alone.
        before: the median time of the original, in seconds.
        after: the median time of the replacement, in seconds.
        interval: where the ratio ``before / after`` lies with a confidence of 95 %.
    """

    rows: int
    backward: bool
    before: float
    after: float
    interval: tuple[float, float]

    @property
    def speedup(self) -> float:
        """The time of the original over that of the replacement."""
        return self.before / self.after

    @property
    def is_slower(self) -> bool:
        """True if the replacement is slower by more than noise: the interval is below 1."""
        return self.interval[1] < 1

    def __str__(self) -> str:
        rows = f"{self.rows} row{'s' * (self.rows != 1)}"
        return f"{rows}{', with backward' * self.backward}: {span(self.before, self.after)}"


def span(before: float, after: float) -> str:
    """Return two times, given in seconds, as text in one unit."""
    unit, scale = ("ms", 1e3) if min(before, after) >= 1e-3 else ("us", 1e6)
    digits = 1 if max(before, after) * scale < 100 else 0
    return f"{before * scale:.{digits}f} -> {after * scale:.{digits}f} {unit}"


def compare(
    before: Callable[[], object],
    after: Callable[[], object],
    rows: int,
    backward: bool = False,
    seconds: float = _MODULE_SECONDS,
    min_samples: int = 3,
) -> Timing:
    """Time two calls in turn.

    Where the replacement seems to be slower but may not be, they are timed again, up to
    ``_MAX_REPEATS`` times in all.

    Args:
        before: runs the original.
        after: runs the replacement.
        rows: the number of rows, for the result.
        backward: whether the calls include a backward, for the result.
        seconds: about how long one measurement takes.
        min_samples: how many samples it takes at least.
    """
    old: list[float] = []
    new: list[float] = []
    end = time.perf_counter() + _MAX_REPEATS * seconds
    for _ in range(_MAX_REPEATS):
        taken = samples([before, after], _ROUNDS, _ROUND_SECONDS, seconds, min_samples)
        old += taken[0]
        new += taken[1]
        found = timing(old, new, rows, backward)
        if found.speedup >= 1:
            break
        enough = len(old) >= _MIN_SAMPLES
        if enough and (found.is_slower or time.perf_counter() >= end):
            break
        min_samples = _MIN_SAMPLES
    return found


def timing(old: Sequence[float], new: Sequence[float], rows: int, backward: bool = False) -> Timing:
    """Return the ``Timing`` of two lists of times in seconds, which were taken in turn."""
    low, high = interval([a / b for a, b in zip(old, new, strict=True)])
    return Timing(rows, backward, statistics.median(old), statistics.median(new), (low, high))


def of_module(
    module: nn.Module,
    drop_in: type,
    classes: dict[nn.Module, type],
    calls: Sequence[ModuleCall],
) -> list[Timing]:
    """Return times of ``module`` against its drop-in, for each call.

    The forward is timed, and for a module in train mode forward and backward together. What runs
    are copies.

    Args:
        module: the original.
        drop_in: the class of the replacement.
        classes: the drop-ins that were decided for modules inside ``module``. Both copies have
            them.
        calls: the inputs.
    """
    old = replica(module, classes=classes, dropout=True)
    new = replica(module, classes=classes | {module: drop_in}, dropout=True)
    found = []
    for call in calls:
        with torch.inference_mode(), evaluating(old), evaluating(new):
            found.append(compare(partial(call.on, old), partial(call.on, new), call.rows))
        if module.training:
            set_training(old, True)
            set_training(new, True)
            before, after = (_step(copied, module, call) for copied in (old, new))
            if before and after:
                found.append(compare(before, after, call.rows, backward=True))
    return found


def _step(copied: nn.Module, module: nn.Module, call: ModuleCall) -> Callable[[], object] | None:
    """Return a function that runs forward and backward of ``copied``; None if nothing is trained.

    Gradients are those of the inputs, without masks, and of the parameters that ``module`` trains.
    """
    masks = [v for k, v in call.kwargs.items() if "mask" in k]

    def leaf(t: Tensor) -> Tensor:
        trained = t.is_floating_point() and not any(t is m for m in masks)
        return t.detach().requires_grad_(trained)

    leaves = call.map(leaf)
    trained = [t for t in leaves.tensors if t.requires_grad]
    # A tied parameter is two in a copy.
    named = (m.named_parameters(remove_duplicate=False) for m in (copied, module))
    for (_, p), (_, original) in zip(*named, strict=True):
        p.requires_grad_(original.requires_grad)
        trained += [p] * original.requires_grad
    if not trained:
        return None

    def step() -> object:
        with torch.enable_grad():
            out = leaves.on(copied)
            first = out[0] if isinstance(out, (tuple, list)) else out
            return torch.autograd.grad(first.sum(), trained, allow_unused=True)

    return step


def kind(
    module: nn.Module,
    drop_in: type,
    classes: dict[nn.Module, type],
    calls: Sequence[ModuleCall],
) -> Hashable:
    """Return everything that a time depends on. Modules with equal kinds are timed once.

    Args:
        module: the original.
        drop_in: the class of the replacement.
        classes: the drop-ins that were decided for modules inside ``module``.
        calls: the inputs.
    """

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
    """A swap that can be turned on and off.

    Args:
        group: the swaps of one group are turned on and off together.
        on: makes the swap.
        off: undoes it.
    """

    group: Hashable
    on: Callable[[], object]
    off: Callable[[], object]


def of_model(
    model: nn.Module, run: ModelRun, switches: Sequence[Switch], search: bool
) -> tuple[list[Timing], dict[Hashable, Timing]]:
    """Return times of a whole model, in eval mode, with all swaps off and on.

    The forward is timed, and for a model in train mode whose parameters get gradients forward and
    backward together.

    Args:
        model: the model.
        run: runs it.
        switches: its swaps.
        search: where the model is slower with them, turn off the group without which it is fastest,
            until it is no longer slower.

    Returns:
        The times, and for each group that was turned off the model's times with and without it.

    Raises:
        Exception: what the model raises; all swaps are on then.
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
        return compare(*calls, rows, backward, _MODEL_SECONDS, min_samples=1)

    try:
        with evaluating(model):
            directions = (False, True) if training and _has_backward(run) else (False,)
            found = [compared(backward) for backward in directions]
            while search and without.keys() != groups and any(t.is_slower for t in found):
                backward = next(t.backward for t in found if t.is_slower)
                left = [g for g in groups if g not in without]
                offs = [set(without), *(set(without) | {g} for g in left)]
                calls = [runs(off, backward) for off in offs]
                taken = samples(calls, _ROUNDS, _ROUND_SECONDS, 2 * _MODEL_SECONDS, min_rounds=3)
                best = min(range(len(left)), key=lambda i: statistics.median(taken[i + 1]))
                without[left[best]] = timing(taken[0], taken[best + 1], rows, backward)
                found = [compared(backward) for backward in directions]
    except BaseException:
        turn(())
        raise
    turn(set(without))
    return found, without


def _has_backward(run: ModelRun) -> bool:
    """Return True if parameters get gradients. Frozen ones and those of inference mode get none."""
    try:
        return run(backward=True)
    except RuntimeError:
        return False
