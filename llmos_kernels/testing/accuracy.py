"""Assertions about accuracy, and what judges a test again that misses one.

The error budget is a multiple of the error that torch makes on the same numbers. Where these are
few, the ratio of the two largest errors is a matter of luck: one test in some hundreds misses its
budget though its errors are torch's. Such a test runs again with other random numbers, and each of
its comparisons is judged by the sums of its errors and of its budgets over all runs. pytest lists
the tests that were judged again.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from llmos_kernels._core import numerics
from llmos_kernels._core.numerics import Compared, Errors

__all__ = [
    "InaccurateError",
    "assert_accurate",
    "assert_errors_within_budget",
    "assert_within_budget",
    "judge_again",
]

#: How often a test that misses a budget runs again.
DRAWS = 16
#: What a test has compared that is being judged again; else None.
_collected: dict[str, Errors] | None = None


class InaccurateError(AssertionError):
    """A result misses its error budget.

    Args:
        what: what was judged.
        over: each error over its budget that is above 1, by name.
    """

    def __init__(self, what: str, over: dict[str, float]) -> None:
        ratios = ", ".join(f"{name} {ratio:.3g}" for name, ratio in over.items())
        super().__init__(f"{what}: error over budget: {ratios}")
        self.is_hopeless = max(over.values()) > numerics.HOPELESS


def assert_within_budget(draws: Sequence[Compared], what: str) -> None:
    """Raise InaccurateError if an error over budget, over all draws together, is above 1.

    Args:
        draws: for each draw and each name, our result, the float64 reference and torch's result.
        what: what is judged, for the message.

    Raises:
        InaccurateError: the message has each error over budget that is above 1.

    Example:
        >>> x, weight = torch.randn(8, 64), torch.randn(32, 64)
        >>> actual, eager = llmos_kernels.linear(x, weight), x @ weight.T
        >>> exact = x.double() @ weight.double().T
        >>> assert_within_budget([{"y": (actual, exact, eager)}], "linear")
    """
    assert_errors_within_budget([numerics.errors_in_ulp(draw) for draw in draws], what)


def assert_errors_within_budget(draws: list[dict[str, Errors]], what: str) -> None:
    """Do what ``assert_within_budget`` does with errors that the caller has measured.

    Args:
        draws: for each draw and each name, our error and torch's, in units of what the budget
            allows beside twice torch's error.
        what: what is judged, for the message.

    Raises:
        InaccurateError: the message has each error over budget that is above 1.
    """
    if _collected is not None:
        _collect(_collected, draws, what)
        return
    over = {k: ratio for k, ratio in numerics.over_budgets(draws).items() if ratio > 1}
    if over:
        raise InaccurateError(what, over)


def _collect(into: dict[str, Errors], draws: list[dict[str, Errors]], what: str) -> None:
    """Add the mean errors of several draws, which count as one comparison."""
    start = len(into)
    for name in draws[0] if draws else ():
        errors = zip(*(draw[name] for draw in draws), strict=True)
        actual, eager = (sum(e) / len(draws) for e in errors)
        into[f"comparison {start}, {what}, {name}"] = actual, eager


def assert_accurate(actual: Tensor, exact: Tensor, eager: Tensor, what: str) -> None:
    """Raise InaccurateError if the error of ``actual`` over its budget is above 1.

    Args:
        actual: our result.
        exact: the float64 reference.
        eager: torch's result, in the dtype of ``actual``.
        what: what is judged, for the message.

    Raises:
        InaccurateError: the error exceeds twice torch's plus one ulp of the largest value.

    Example:
        >>> x, weight = torch.randn(8, 64), torch.randn(32, 64)
        >>> actual, eager = llmos_kernels.linear(x, weight), x @ weight.T
        >>> assert_accurate(actual, x.double() @ weight.double().T, eager, "linear")
    """
    assert_within_budget([{"error": (actual, exact, eager)}], what)


def judge_again(test: Callable[[], object], missed: InaccurateError) -> None:
    """Run ``test``, which has raised ``missed``, with more random numbers and judge all together.

    Args:
        test: takes its random numbers from seeds that ``shifted`` was asked for.
        missed: what it raised.

    Raises:
        InaccurateError: the errors of a comparison exceed its budgets in sum, or ``missed`` is
            so large that chance does not explain it.
    """
    if missed.is_hopeless:
        raise missed
    over = {k: r for k, r in numerics.over_budgets(_errors_of_runs(test)).items() if r > 1}
    if over:
        raise InaccurateError(f"{DRAWS + 1} runs", over) from missed


def _errors_of_runs(test: Callable[[], object]) -> Iterator[dict[str, Errors]]:
    """Run ``test`` with its own seeds and with others, and yield what it compares."""
    global _collected
    shift = numerics.shift
    try:
        for i in range(DRAWS + 1):
            numerics.shift = shift + 1000 * i
            _collected = {}
            test()
            yield _collected
    finally:
        numerics.shift, _collected = shift, None
