"""Cases of every op, functions that run and judge them, and timing, for tests and benchmarks.

The library itself never imports this package.
"""

from llmos_kernels._core.numerics import (
    error_over_budget,
    generator,
    judged_together,
    make_gradients,
    shifted,
)
from llmos_kernels._core.timing import interleaved, interval, samples
from llmos_kernels.testing.accuracy import (
    InaccurateError,
    assert_accurate,
    assert_errors_within_budget,
    assert_within_budget,
    judge_again,
)
from llmos_kernels.testing.cases import CASES, Case
from llmos_kernels.testing.harness import (
    DTYPES,
    OpRecorder,
    cast,
    compare,
    draw,
    map_tensors,
    raw_calls,
    run,
    run_with_gradients,
    tensors,
    worst_error,
)

__all__ = [
    "CASES",
    "DTYPES",
    "Case",
    "InaccurateError",
    "OpRecorder",
    "assert_accurate",
    "assert_errors_within_budget",
    "assert_within_budget",
    "cast",
    "compare",
    "draw",
    "error_over_budget",
    "generator",
    "interleaved",
    "interval",
    "judge_again",
    "judged_together",
    "make_gradients",
    "map_tensors",
    "raw_calls",
    "run",
    "run_with_gradients",
    "samples",
    "shifted",
    "tensors",
    "worst_error",
]
