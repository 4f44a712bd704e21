"""What tests and benchmarks share: cases, how they are run, how errors are judged, how times are taken.

The library itself never imports it.
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
