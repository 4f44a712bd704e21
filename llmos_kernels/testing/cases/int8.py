"""Checks and calls of the int8 ops, for ``verify`` and ``inspect``.

They are no ``Case``: their integers must be equal, without an error budget, and have no
derivatives.
"""

from collections.abc import Iterator

import torch

from llmos_kernels._core.numerics import error_over_budget
from llmos_kernels.ops._activations import GELU, NONE, RELU
from llmos_kernels.ops.int8 import int8_quantize
from llmos_kernels.ops.int8_linear import (
    WEIGHT_ONLY_ROWS,
    int8_linear,
    int8_linear_reference,
)
from llmos_kernels.ops.int8_vnni_weight import int8_vnni_weight

#: (rows, inner, outer) for ``verify``.
SHAPES = ((1, 70, 33), (3, 64, 40), (17, 300, 65), (130, 64, 130))
#: (rows, inner, outer) of one row, of a small and a large product, and of odd sizes.
LAUNCH_SHAPES = ((1, 4096, 4096), (128, 384, 1536), (4096, 4096, 4096), (9, 77, 33))
OPTIONS: tuple[dict, ...] = ({}, {"outlier_threshold": 6.0}, {"mode": "weight_only"})


def worst_error(dtype: torch.dtype, device: str) -> float:
    """Return the largest error over budget of ``int8_linear`` in any mode and weight layout."""
    worst = 0.0
    for rows, inner, outer in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(rows, inner, device=device).to(dtype)
        x[:, 3] *= 30
        weight, scale = int8_quantize(torch.randn(outer, inner, device=device))
        bias = torch.randn(outer, device=device).to(dtype)
        for options in OPTIONS:
            exact = int8_linear_reference(x.double(), weight, scale, bias.double(), **options)
            eager = int8_linear_reference(x, weight, scale, bias, **options)
            for vnni_weight in (None, int8_vnni_weight(weight)):
                actual = int8_linear(x, weight, scale, bias, **options, vnni_weight=vnni_weight)
                worst = max(worst, error_over_budget(actual, exact, eager))
    return worst


def raw_calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """Yield the names of int8 ops and uninitialised arguments, for every kind of call."""
    for rows, k, n in LAUNCH_SHAPES:
        x, weight = torch.empty(rows, k, dtype=dtype), torch.empty(n, k, dtype=torch.int8)
        a, a_scale = torch.empty(rows, k, dtype=torch.int8), torch.empty(rows)
        scale, bias, row = torch.empty(n), torch.empty(n, dtype=dtype), x[0]
        for given in (x, x.mT):
            yield "llmos::int8_quantize", (given,)
        for activation in (NONE, GELU):
            last = bias, activation
            yield "llmos::int8_matmul", (a, weight, a_scale, scale, None, *last, dtype)
            yield "llmos::int8_linear", (x, weight, scale, None, *last, 6.0)
            if rows <= WEIGHT_ONLY_ROWS:
                yield "llmos::int8_weight_only", (x, weight, scale, *last)
        unsigned = a.view(torch.uint8)
        yield "llmos::int8_matmul", (unsigned, weight, a_scale, scale, None, bias, NONE, dtype)
        yield "llmos::int8_linear_rows", (x, weight, scale, None, bias, RELU)
        for residual, parameter in ((None, None), (x, row)):
            yield "llmos::int8_norm", (x, residual, parameter, parameter, k, 1e-5, True)
