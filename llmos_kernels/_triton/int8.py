"""Triton kernels of int8 rows and their products; formulas in ``ops/int8.py``.

A product's program owns a tile of out: int32 sums over the inner dimension, then scales, bias and
activation in registers.
Bytes: rows once for each pass of quantising; out once, a once for each block of columns, b once for each
block of rows.
"""

import torch
import triton
import triton.language as tl

from llmos_kernels._triton.activation import activate
from llmos_kernels._triton.products import halves, place
from llmos_kernels.ops.int8 import SMALLEST

_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST)
_TO_WHOLE: tl.constexpr = tl.constexpr(1.5 * 2**23)  # Added and taken off: rounds, ties to even.


@triton.jit
def _quantize_kernel(input, rows, scale, K, input_row, input_col, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    input += row * input_row + k.to(tl.int64) * input_col
    rows += row * K + k
    step = tl.full((), BLOCK, tl.int64)
    most = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    at = input
    for start in range(0, K, BLOCK):
        x = tl.abs(tl.load(at, k < K - start, 0.0).to(tl.float32))
        bad |= (~(x < float("inf"))).to(tl.int32)
        most = tl.maximum(most, x)
        at += step * input_col
    finite = tl.max(bad, 0) == 0
    largest = tl.max(most, 0)
    some = finite & (largest >= _SMALLEST)
    of = tl.where(some, largest, 127.0)
    tl.store(scale + row, tl.where(some, tl.div_rn(of, 127.0), tl.where(finite, 0.0, float("nan"))))
    inverse = tl.where(some, tl.div_rn(127.0, of), 0.0)
    for start in range(0, K, BLOCK):
        x = tl.load(input, k < K - start, 0.0).to(tl.float32)
        x = tl.where(some, x, 0.0) * inverse
        tl.store(rows, ((x + _TO_WHOLE) - _TO_WHOLE).to(tl.int8), k < K - start)
        input += step * input_col
        rows += BLOCK


@triton.jit
def _finish(acc, a_scale, b_scale, bias, out, row, first_col, M, N, ACTIVATION: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out of the rows ``row`` and BLOCK_N columns from ``first_col`` on, by 32 columns."""
    if BLOCK_N > 32:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _finish(left, a_scale, b_scale, bias, out, row, first_col, M, N, ACTIVATION, BLOCK_M,
                BLOCK_N // 2)  # fmt: skip
        _finish(right, a_scale, b_scale, bias, out, row, first_col + BLOCK_N // 2, M, N, ACTIVATION,
                BLOCK_M, BLOCK_N // 2)  # fmt: skip
    else:
        col = first_col + tl.arange(0, BLOCK_N)
        z = acc.to(tl.float32) * tl.load(a_scale + row, row < M, 0.0)[:, None]
        z *= tl.load(b_scale + col, col < N, 0.0)[None, :]
        if bias is not None:
            z += tl.load(bias + col, col < N, 0.0).to(tl.float32)[None, :]
        y = activate(z.to(out.dtype.element_ty).to(tl.float32), ACTIVATION)
        inside = (row < M)[:, None] & (col < N)[None, :]
        tl.store(out + row[:, None] * N + col[None, :], y, inside)


@triton.jit(do_not_specialize=["M"])
def _product_kernel(a, b, a_scale, b_scale, bias, out, M, N, K, a_row, b_row,
                    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr):  # fmt: skip
    _, first_row, first_col = place(M, N, 1, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a += row[:, None] * a_row + k[None, :]
    b += col[None, :] * b_row + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        x = tl.load(a, (row < M)[:, None] & inside[None, :], 0)
        y = tl.load(b, inside[:, None] & (col < N)[None, :], 0)
        acc = tl.dot(x, y, acc, out_dtype=tl.int32)
        a += BLOCK_K
        b += BLOCK_K
    _finish(acc, a_scale, b_scale, bias, out, row, first_col, M, N, ACTIVATION, BLOCK_M, BLOCK_N)


def quantize(input):
    m, k = input.shape
    rows = input.new_empty((m, k), dtype=torch.int8)
    scale = input.new_empty(m, dtype=torch.float32)
    if m:
        block = min(max(triton.next_power_of_2(k), 16), 4096)
        _quantize_kernel[(m,)](
            input, rows, scale, k, *input.stride(), BLOCK=block, num_warps=max(block // 1024, 1)
        )
    return rows, scale


def matmul(a, b, a_scale, b_scale, bias, activation, dtype):
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((m, n), dtype=dtype)
    if out.numel() == 0:
        return out
    block_m, block_n, block_k, warps, stages = (
        (16, 32, 256, 4, 4) if m <= 16 else (128, 128, 64, 8, 4)
    )
    if m > 16 and triton.cdiv(m, 128) * triton.cdiv(n, 128) < 96:
        block_m, block_n, block_k, warps, stages = 64, 64, 64, 4, 4
    _product_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        a, b, a_scale.contiguous(), b_scale.contiguous(),
        None if bias is None else bias.contiguous(), out, m, n, k, a.stride(0), b.stride(0),
        ACTIVATION=activation, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out
