"""Arguments and expected results of int8 ops; shared by the tests of int8."""

import torch

from llmos_kernels.ops.int8_linear import int8_linear_reference
from llmos_kernels.testing import assert_accurate

#: (rows, inner, outer): empty, one element, primes, few rows, several blocks in each dimension.
SHAPES = (
    (0, 8, 16),
    (3, 0, 8),
    (3, 8, 0),
    (1, 1, 1),
    (2, 3, 5),
    (1, 300, 33),
    (4, 129, 260),
    (5, 64, 64),
    (17, 31, 65),
    (67, 520, 97),
    (130, 72, 40),
    (300, 3100, 130),
    (9, 7001, 11),
)


def arguments(rows, inner, outer, dtype=torch.float32, device="cpu"):
    """Return an input with a row of zeros, an int8 weight, its scales and a bias."""
    torch.manual_seed(rows + inner)
    x = torch.randn(rows, inner, device=device) * 3
    x[1:2] = 0
    weight = torch.randint(-128, 128, (outer, inner), dtype=torch.int8, device=device)
    scale, bias = torch.rand(outer, device=device) / 100, torch.randn(outer, device=device)
    return x.to(dtype), weight, scale, bias.to(dtype)


def exact(a, b, a_scale, b_scale, bias, dtype):
    """Return the product of int8 matrices, with exact integer sums."""
    z = (a.long() @ b.long().mT).float() * a_scale[..., None] * b_scale
    return (z if bias is None else z + bias.float()).to(dtype)


def with_outliers(x, every=50):
    """Scale every ``every``-th column of ``x``, and one element, beyond the threshold of 6."""
    if x.numel():
        x[:, 3::every] *= 20
        x[0, x.shape[1] // 2] = 30
    return x


def judged(fn, x, weight, scale, bias, **options):
    """Assert the error budget of ``fn``, against the reference in float64 and in x's dtype."""
    args = weight, scale
    wide = int8_linear_reference(x.double(), *args, bias.double(), **options)
    eager = int8_linear_reference(x, *args, bias, **options)
    assert_accurate(fn(x, *args, bias, **options), wide, eager, f"{list(x.shape)} {options}")
