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
from llmos_kernels.testing.cases import CASES, Case
from llmos_kernels.testing.harness import (
    DTYPES,
    OpRecorder,
    assert_accurate,
    cast,
    draw,
    errors,
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
    "OpRecorder",
    "assert_accurate",
    "cast",
    "draw",
    "error_over_budget",
    "errors",
    "generator",
    "interleaved",
    "interval",
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
