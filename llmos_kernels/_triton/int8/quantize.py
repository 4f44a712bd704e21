"""Triton kernels that quantize rows to int8; the formulas are in ``ops/int8.py``.

With outliers there are two launches. The first marks the columns that hold any (all thread blocks
write the same value, so their order does not matter). The second quantizes the rows, and one
further thread block lists the marked columns.

Memory traffic: the input is read twice to quantize it and once to find outliers.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel
from llmos_kernels.ops.int8 import SMALLEST

_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST)
#: Adding this and subtracting it again rounds a float32 to an integer, with ties to even.
_ROUNDING: tl.constexpr = tl.constexpr(1.5 * 2**23)


@kernel(do_not_specialize=["M"])
def mark_kernel(input, marks, threshold, M, K, input_row, input_col, BLOCK_M: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """Store marks[k] = 1 if column k has an outlier in the rows of this thread block."""
    blocks = tl.cdiv(K, BLOCK_K)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    at = input + row.to(tl.int64)[:, None] * input_row + k.to(tl.int64)[None, :] * input_col
    x = tl.abs(tl.load(at, (row < M)[:, None] & (k < K)[None, :], 0.0).to(tl.float32))
    found = tl.max((x >= threshold).to(tl.int32), 0) > 0
    tl.store(marks + k, tl.full((BLOCK_K,), 1, tl.int32), found & (k < K))


@triton.jit
def _list_outliers(marks, index, K, BLOCK: tl.constexpr):
    """Store the number of marked columns in index[0], and the columns after it in order."""
    k = tl.arange(0, BLOCK)
    count = tl.full((), 0, tl.int32)
    for start in range(0, K, BLOCK):
        marked = tl.load(marks + start + k, k < K - start, 0)
        tl.store(index + count + tl.cumsum(marked, 0), start + k, marked > 0)
        count += tl.sum(marked, 0)
    tl.store(index, count)


@triton.jit
def quantization_scale(largest, finite, LEVELS: tl.constexpr):
    """Return the scale of rows with these largest magnitudes, and its inverse.

    Both are 0 for a row of zeros; where not ``finite`` the scale is NaN and the inverse 0.
    """
    some = finite & (largest >= _SMALLEST)
    of = tl.where(some, largest, LEVELS * 1.0)
    levels = tl.full(of.shape, LEVELS, tl.float32)
    scale = tl.where(some, tl.div_rn(of, levels), tl.where(finite, 0.0, float("nan")))
    return scale, tl.where(some, tl.div_rn(levels, of), 0.0)


@triton.jit
def round_to_integer(x):
    """Return x rounded to the nearest integer, ties to even."""
    return (x + _ROUNDING) - _ROUNDING


@kernel(do_not_specialize=["M"])
def _quantize_kernel(input, rows, scale, marks, index, M, K, input_row, input_col,
                     LEVELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Quantize one row for each thread block; outliers become 0.

    With marks, one further thread block lists the outlier columns in index.
    """
    if marks is not None:  # noqa: SIM102  Triton evaluates this condition when it compiles.
        if tl.program_id(0) == M:
            _list_outliers(marks, index, K, BLOCK)
            return
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    input += row * input_row + k.to(tl.int64) * input_col
    rows += row * K + k
    step = tl.full((), BLOCK, tl.int64)
    magnitude = tl.zeros((BLOCK,), tl.float32)
    nonfinite = tl.zeros((BLOCK,), tl.int32)
    at = input
    for start in range(0, K, BLOCK):
        x = tl.abs(tl.load(at, k < K - start, 0.0).to(tl.float32))
        if marks is not None:
            x = tl.where(tl.load(marks + start + k, k < K - start, 0) > 0, 0.0, x)
        nonfinite |= (~(x < float("inf"))).to(tl.int32)
        magnitude = tl.maximum(magnitude, x)
        at += step * input_col
    finite = tl.max(nonfinite, 0) == 0
    largest = tl.max(magnitude, 0)
    stored, inverse = quantization_scale(largest, finite, LEVELS)
    tl.store(scale + row, stored)
    for start in range(0, K, BLOCK):
        x = tl.load(input, k < K - start, 0.0).to(tl.float32)
        if marks is not None:
            x = tl.where(tl.load(marks + start + k, k < K - start, 0) > 0, 0.0, x)
        x = tl.where(inverse > 0, x, 0.0) * inverse
        tl.store(rows, round_to_integer(x).to(rows.dtype.element_ty), k < K - start)
        input += step * input_col
        rows += BLOCK


def quantize(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 rows and their scales of ``llmos::int8_quantize``."""
    return quantize_rows(input, None, None, 127)


def quantize_rows(
    input: Tensor, marks: Tensor | None, index: Tensor | None, levels: int
) -> tuple[Tensor, Tensor]:
    """Return the rows, int8 for 127 ``levels`` or uint8 for 255, and their scales.

    With ``marks``, the columns that it marks become 0 and are listed in ``index``.
    """
    m, k = input.shape
    rows = input.new_empty((m, k), dtype=torch.int8 if levels == 127 else torch.uint8)
    scale = input.new_empty(m, dtype=torch.float32)
    if m:
        block = min(max(triton.next_power_of_2(k), 16), 4096)
        _quantize_kernel[(m + (marks is not None),)](
            input,
            rows,
            scale,
            marks,
            index,
            m,
            k,
            *input.stride(),
            LEVELS=levels,
            BLOCK=block,
            num_warps=max(block // 1024, 1),
        )
    return rows, scale


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for dtype, rows, k, _ in pack_shapes.products():
        yield quantize, (torch.empty(rows, k, dtype=dtype),)
