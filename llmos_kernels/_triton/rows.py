"""Shared parts of the row-wise kernels: views as rows, the launch rule and the dropout mask."""

from typing import TypeVar

import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.runtime import settings
from llmos_kernels.ops._dropout import ROUNDS

_OptionalTensor = TypeVar("_OptionalTensor", Tensor, Tensor | None)
_ROUNDS = tl.constexpr(ROUNDS)


def row_stride(t: Tensor, d: int) -> int | None:
    """Return the stride between rows of ``d`` elements, or None if no single stride reaches all."""
    inner, rows, stride = 1, 1, d
    for size, step in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if size == 1:
            continue
        if inner < d:
            if step != inner:
                return None
            inner *= size
        elif rows == 1:
            rows, stride = size, step
        elif step != stride * rows:
            return None
        else:
            rows *= size
    return stride


def as_rows(t: _OptionalTensor, d: int) -> tuple[_OptionalTensor, int]:
    """Return ``t`` and its row stride; ``t`` is copied if no single stride reaches all its rows."""
    if t is None:
        return None, 0
    stride = row_stride(t, d)
    return (t.contiguous(), d) if stride is None else (t, stride)


def row_block(kind: str, like: Tensor, d: int, per_thread: int = 16) -> tuple[int, int, int]:
    """Return the rows, columns and warps of a thread block that holds whole rows of ``d`` elements.

    They are as tuned for ``kind``. Otherwise each thread has about ``per_thread`` elements, and
    short rows share a thread block, up to 2048 elements in all. The rule depends on ``d`` alone, so
    that the order of a row's sums does not depend on its batch.
    """
    block = max(triton.next_power_of_2(d), 16)
    if found := settings.settings(kind, like, (d,)):
        return found["ROWS"], block, found["num_warps"]
    rows = max(2048 // block, 1)
    return rows, block, min(max(rows * block // (32 * per_thread), 1), 16)


def dropout_arguments(p: float) -> tuple[int, float]:
    """Return the Philox word below which an element is dropped, and the scale of the others."""
    return int(p * 2**32), 1 / (1 - p)


@triton.jit
def dropout_factors(
    seed, row, first_col, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the dropout factors of rows ``row`` and BLOCK columns from ``first_col``.

    A factor is 0 or ``scale``, and ``row`` is [ROWS, 1]. The mask is that of ``ops/_dropout.py``:
    one Philox call gives four columns.
    """
    zero = tl.zeros((ROWS, BLOCK // 4), tl.int64)
    group = zero + first_col // 4 + tl.arange(0, BLOCK // 4)[None, :]
    c0 = group.to(tl.uint32)
    c1 = (zero + row).to(tl.uint32)
    c2 = (zero + (row >> 32)).to(tl.uint32)
    c3 = (zero + tl.load(seed + 1)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3, n_rounds=_ROUNDS)
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape((ROWS, BLOCK))
    return tl.where(word < threshold.to(tl.uint32), 0.0, scale)
