"""The error budget that every result is held to, and the random numbers of tests and proofs.

    error <= 2 * (error of torch in the same dtype) + 1 ulp of the largest value

An error is the largest distance to the float64 reference. Tests and the proofs of swaps share these
functions.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: An error that is so many times its budget is not chance, and is not judged again.
HOPELESS = 4.0
#: What is judged: the result, the float64 reference, and torch's result.
Triple = tuple[Tensor, Tensor, Tensor]
#: Several of them, by name.
Compared = dict[str, Triple]
#: An exact value that is so much smaller than torch's error is 0 but for the rounding of float64.
_ZERO = 2.0**-20
#: The largest errors of a result and of torch's, in ulp of the largest exact value.
Errors = tuple[float, float]

#: ``pytest --seed N`` sets this to N: each fixed seed of tests and proofs is raised by 1000 * N.
shift = 0


def shifted(seed: int) -> int:
    """Return ``seed`` raised by 1000 times the shift of this run, which is 0 by default.

    Args:
        seed: a fixed seed of a test or a proof.

    Returns:
        The seed for this run.
    """
    return seed + 1000 * shift


def generator(seed: int) -> torch.Generator:
    """Return a new CPU generator, seeded with ``shifted(seed)``.

    Args:
        seed: a fixed seed of a test or a proof.

    Returns:
        The generator.
    """
    return torch.Generator().manual_seed(shifted(seed))


class Wide(TorchFunctionMode):
    """Lets code that casts to a narrower dtype between its operations be exact in float64.

    A cast of a tensor in float64 leaves it as it is, whichever floating point dtype is asked for,
    and so does the ``dtype`` of a softmax or sum. Numbers become tensors in float64. Of this
    package's ops, which kernels have for narrower dtypes alone, the reference runs.

    Example:
        >>> x = torch.rand(4, dtype=torch.float64)
        >>> with Wide():
        ...     x.float().softmax(-1, dtype=torch.float32).dtype
        torch.float64
    """

    _NARROW = frozenset((torch.float32, torch.float16, torch.bfloat16))
    _CASTS = frozenset((Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type_as))
    _NUMBERS = frozenset((torch.full, torch.tensor, torch.scalar_tensor))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "llmos":
            return self._by_reference(func, args, kwargs)
        named = (kwargs[name] for name in ("fill_value", "data", "s") if name in kwargs)
        number = next(named, args[-1] if args else None)
        if func in self._NUMBERS and isinstance(number, float):
            kwargs = {"dtype": torch.float64} | kwargs
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func in self._CASTS and all(self._is_narrow(a) for a in args[1:]):
                return args[0]
            args = (args[0], *map(self._widened, args[1:]))
            kwargs = {k: self._widened(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _by_reference(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from llmos_kernels._core.registry import DEFINED

        name = op.name()
        chosen = name.endswith("_by_policy")  # With an argument more for the policy.
        known = DEFINED.get(name.removesuffix("_by_policy"))
        is_wide = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        if known is None or not is_wide:
            return op(*args, **kwargs)
        return known.reference(*(args[:-1] if chosen else args), **kwargs)

    def _is_narrow(self, value: Any) -> bool:
        return getattr(value, "dtype", value) in self._NARROW

    def _widened(self, value: Any) -> Any:
        is_dtype = isinstance(value, torch.dtype) and value in self._NARROW
        return torch.float64 if is_dtype else value


def exactly(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Return ``Wide()`` where ``dtype`` is float64, else a context that does nothing.

    Args:
        dtype: the dtype in which something runs; None for its own.

    Returns:
        A context manager.
    """
    return Wide() if dtype == torch.float64 else contextlib.nullcontext()


def make_gradients(outputs: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Return a random incoming gradient for each output.

    The numbers are drawn in float64, so they are the same for every dtype up to rounding.

    Args:
        outputs: the outputs of an op.
        seed: of the random numbers; ``shifted``.

    Returns:
        For each output a tensor of its shape, dtype and device.
    """
    random = generator(seed)
    return tuple(
        torch.randn(o.shape, generator=random, dtype=torch.float64, device="cpu").to(
            o.device, o.dtype
        )
        for o in outputs
    )


def with_scale(gradients: Sequence[Triple]) -> list[Triple]:
    """Return what is judged of ``gradients``, so that each of them has a scale.

    A softmax does not see what is added to all logits of a row, so that the gradient of a bias of
    keys is 0. What is computed of it is rounding alone, in float64 too, and has no unit in the last
    place. Such a gradient is judged together with the others of as many dimensions, or with all.

    Args:
        gradients: of the parameters and inputs of one module.

    Returns:
        As many: those that are 0 flattened and joined with others.
    """

    def joined(i: int) -> Triple:
        rank = gradients[i][1].ndim
        others = [g for k, g in enumerate(gradients) if k != i and not zero[k]]
        others = [g for g in others if g[1].ndim == rank] or others
        a, b, c = (
            torch.cat([t.flatten() for t in ts]) for ts in zip(gradients[i], *others, strict=True)
        )
        return a, b, c

    def is_zero(exact: Tensor, eager: Tensor) -> bool:
        if eager.shape != exact.shape or not exact.numel():
            return False
        error = (eager.double() - exact).abs().max()
        return bool(exact.abs().max() < _ZERO * error) and bool(error.isfinite())

    zero = [is_zero(exact, eager) for _, exact, eager in gradients]
    return [joined(i) if zero[i] else g for i, g in enumerate(gradients)]


def error_over_budget(actual: Tensor, exact: Tensor, eager: Tensor) -> float:
    """Return the largest error of ``actual`` divided by its budget: a result of 1 or less passes.

    The budget is twice the error that torch (``eager``) makes in the same dtype, plus one unit in
    the last place of the largest value of ``exact``. ``actual`` must be NaN or infinite exactly
    where ``eager`` is.

    Args:
        actual: our result.
        exact: the float64 reference.
        eager: torch's result, in the dtype of ``actual``.

    Returns:
        The ratio; infinity where dtype, shape, NaNs or infinities differ.
    """
    return _over_budget([_errors_in_ulp(actual, exact, eager)])


def _errors_in_ulp(actual: Tensor, exact: Tensor, eager: Tensor) -> Errors:
    """Return the largest errors of ``actual`` and ``eager``, in ulp of the largest exact value.

    The pair is (inf, 0) if ``actual`` differs from ``eager`` in dtype, shape, NaNs or infinities.
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
    if ulp == 0:  # ``exact`` is all zero, so twice the error of ``eager`` serves as the unit.
        return (error / (2 * allowed) if allowed else wrong[0] if error else 0.0), 0.0
    return error / ulp, allowed / ulp


def _over_budget(errors: Sequence[Errors]) -> float:
    """Return the sum of the errors divided by the sum of their budgets."""
    return sum(error for error, _ in errors) / sum(2 * allowed + 1 for _, allowed in errors)


def judged_together(draws: Iterable[Compared]) -> dict[str, float]:
    """Return the error over budget of each named (actual, exact, eager), averaged over the draws.

    Args:
        draws: for each draw and each name, our result, the float64 reference and torch's result.

    Returns:
        The ratio of each name; infinity for a name that is missing from any draw.
    """
    return over_budgets(errors_in_ulp(draw) for draw in draws)


def errors_in_ulp(compared: Compared) -> dict[str, Errors]:
    """Return the largest errors of each named (actual, exact, eager), of actual and of eager."""
    return {name: _errors_in_ulp(*values) for name, values in compared.items()}


def over_budgets(draws: Iterable[dict[str, Errors]]) -> dict[str, float]:
    """Return ``judged_together`` of the draws that ``errors_in_ulp`` was asked about."""
    errors: dict[str, list[Errors]] = {}
    count = 0
    for draw in draws:
        count += 1
        for name, pair in draw.items():
            errors.setdefault(name, []).append(pair)
    return {k: _over_budget(v) if len(v) == count else math.inf for k, v in errors.items()}
