"""The error budget that every result is held to, and the random numbers that results are compared on.

    error <= 2 * (error of torch in the same dtype) + 1 ulp of the largest value

Errors are distances to a float64 reference. Proofs of swaps and tests use the same functions.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

#: Every fixed seed of tests and proofs is shifted by as many thousands: ``pytest --seed``.
shift = 0


def shifted(seed: int) -> int:
    """A fixed seed, or the one that stands for it in this run."""
    return seed + 1000 * shift


def generator(seed: int) -> torch.Generator:
    """A new generator on the CPU, seeded with ``shifted(seed)``."""
    return torch.Generator().manual_seed(shifted(seed))


def make_gradients(outputs: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """An incoming gradient for each output: the same numbers whatever their dtype."""
    drawn_by = generator(seed)
    return tuple(
        torch.randn(o.shape, generator=drawn_by, dtype=torch.float64).to(o.device, o.dtype)
        for o in outputs
    )


def error_over_budget(actual: Tensor, exact: Tensor, eager: Tensor) -> float:
    """The largest error of ``actual`` over what it may be; 1 or less passes.

    A kernel may err twice as much as torch does in the same dtype, plus one unit in the last place
    of the largest value. Where torch gives NaN or infinity, so must the kernel.
    """
    return _over_budget([_errors_in_ulp(actual, exact, eager)])


def _errors_in_ulp(actual: Tensor, exact: Tensor, eager: Tensor) -> tuple[float, float]:
    """The largest error of ``actual`` and of ``eager``, in units in the last place of the largest
    value. Infinity and 0 where ``actual`` has another form than ``eager``, or is not finite elsewhere.
    """
    wrong = float("inf"), 0.0
    if actual.dtype != eager.dtype or actual.shape != eager.shape:
        return wrong
    if actual.numel() == 0:
        return 0.0, 0.0
    finite = eager.isfinite() & exact.isfinite()
    if not torch.equal(actual.isnan(), eager.isnan()):
        return wrong
    if not torch.equal(actual.isfinite() & exact.isfinite(), finite):
        return wrong
    if not finite.any():
        return 0.0, 0.0
    eps = torch.finfo(actual.dtype).eps
    actual, exact, eager = (t.double() for t in (actual, exact, eager))
    if not finite.all():
        actual, exact, eager = (t[finite] for t in (actual, exact, eager))
    error, allowed = ((t - exact).abs().max().item() for t in (actual, eager))
    ulp = eps * exact.abs().max().item()
    if ulp == 0:  # There is no largest value: twice the error of torch is the unit.
        return (error / (2 * allowed) if allowed else wrong[0] if error else 0.0), 0.0
    return error / ulp, allowed / ulp


def _over_budget(errors: Sequence[tuple[float, float]]) -> float:
    """The sum of some errors over the sum of what they may be."""
    return sum(own for own, _ in errors) / sum(2 * allowed + 1 for _, allowed in errors)


def judged_together(
    draws: Iterable[dict[str, tuple[Tensor, Tensor, Tensor]]],
) -> dict[str, float]:
    """``error_over_budget`` of each named (actual, exact, eager), in the mean of the draws; infinity for
    what is not in all of them."""
    found: dict[str, list[tuple[float, float]]] = {}
    count = 0
    for draw in draws:
        count += 1
        for name, compared in draw.items():
            found.setdefault(name, []).append(_errors_in_ulp(*compared))
    return {k: _over_budget(v) if len(v) == count else math.inf for k, v in found.items()}
