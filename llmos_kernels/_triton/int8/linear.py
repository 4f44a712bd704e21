"""Triton kernels of int8 GEMMs; the formulas are in ``ops/int8.py`` and ``ops/int8_linear.py``.

A thread block computes one tile of out: it accumulates in int32, and the epilogue applies scales,
bias and activation in registers. With outliers (``quantize.py``) it then adds the products of the
listed columns to its scaled sums.

Memory traffic: a is read once for each column of tiles, b once for each row of tiles, and out is
written once.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.gemm.activation import activate
from llmos_kernels._triton.gemm.gemm import TILE, halves, part_and_origin
from llmos_kernels._triton.int8.quantize import mark_kernel, quantize_rows
from llmos_kernels._triton.runtime import pack_shapes, settings
from llmos_kernels._triton.runtime.launch import kernel
from llmos_kernels.ops._activations import GELU, GELU_TANH, NONE, RELU, RELU2
from llmos_kernels.ops.int8_linear import WEIGHT_ONLY_ROWS


@triton.jit
def _epilogue(z, b_scale, bias, out, row, first_col, M, N, ACTIVATION: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Store out of rows ``row`` and BLOCK_N columns from ``first_col``, 32 columns at a time."""
    if BLOCK_N > 32:
        left, right = halves(z, BLOCK_M, BLOCK_N)
        _epilogue(left, b_scale, bias, out, row, first_col, M, N, ACTIVATION, BLOCK_M, BLOCK_N // 2)
        _epilogue(
            right,
            b_scale,
            bias,
            out,
            row,
            first_col + BLOCK_N // 2,
            M,
            N,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N // 2,
        )
    else:
        col = first_col + tl.arange(0, BLOCK_N)
        z *= tl.load(b_scale + col, col < N, 0.0)[None, :]
        if bias is not None:
            z += tl.load(bias + col, col < N, 0.0).to(tl.float32)[None, :]
        y = activate(z.to(out.dtype.element_ty).to(tl.float32), ACTIVATION)
        inside = (row < M)[:, None] & (col < N)[None, :]
        tl.store(out + row[:, None] * N + col[None, :], y, inside)


@kernel(do_not_specialize=["M"])
def _product_kernel(a, b, a_scale, b_scale, bias, out, zeros, index, input, M, N, K, a_row,
                    b_row, input_row, input_col, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Compute a tile of out of the int8 GEMM, with the outlier columns that ``index`` lists."""
    _, first_row, first_col = part_and_origin(M, N, 1, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a += row[:, None] * a_row + k[None, :]
    weight = b + col[None, :] * b_row
    b = weight + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        x = tl.load(a, (row < M)[:, None] & inside[None, :], 0)
        y = tl.load(b, inside[:, None] & (col < N)[None, :], 0)
        acc = tl.dot(x, y, acc, out_dtype=tl.int32)
        a += BLOCK_K
        b += BLOCK_K
    if zeros is not None:
        acc += tl.load(zeros + col, col < N, 0)[None, :]
    z = acc.to(tl.float32) * tl.load(a_scale + row, row < M, 0.0)[:, None]
    if index is not None:
        input += row.to(tl.int64)[:, None] * input_row
        at_place = tl.arange(0, 16)
        for start in range(0, tl.load(index), 16):
            inside = at_place < tl.load(index) - start
            which = tl.load(index + 1 + start + at_place, inside, 0).to(tl.int64)
            x = tl.load(
                input + which[None, :] * input_col, (row < M)[:, None] & inside[None, :], 0.0
            )
            y = tl.load(weight + which[:, None], inside[:, None] & (col < N)[None, :], 0)
            z = tl.dot(x, y.to(x.dtype), z, input_precision="ieee")
    _epilogue(z, b_scale, bias, out, row, first_col, M, N, ACTIVATION, BLOCK_M, BLOCK_N)


@kernel(do_not_specialize=["M"])
def _weight_only_kernel(input, weight, scale, bias, out, M, N, K, input_row, input_col, weight_row,
                        ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_K: tl.constexpr):  # fmt: skip
    """Compute all rows of BLOCK_N columns of out, converting the int8 weight in registers."""
    row = tl.arange(0, BLOCK_M)
    first_col = tl.program_id(0).to(tl.int64) * BLOCK_N
    col = first_col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    input += row[:, None].to(tl.int64) * input_row + k[None, :].to(tl.int64) * input_col
    weight += col[None, :] * weight_row + k[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        x = tl.load(input, (row < M)[:, None] & inside[None, :], 0.0)
        y = tl.load(weight, inside[:, None] & (col < N)[None, :], 0)
        z = tl.dot(x, y.to(x.dtype), z, input_precision="ieee")
        input += tl.full((), BLOCK_K, tl.int64) * input_col
        weight += BLOCK_K
    _epilogue(z, scale, bias, out, row, first_col, M, N, ACTIVATION, BLOCK_M, BLOCK_N)


def matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    vnni_weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the result of ``llmos::int8_matmul``; CPUs alone use ``vnni_weight``."""
    return _matmul(a, b, a_scale, b_scale, bias, activation, dtype, None, None)


def _matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: int,
    dtype: torch.dtype,
    index: Tensor | None,
    input: Tensor | None,
) -> Tensor:
    """Return the result of the int8 GEMM of a and b^T with its epilogue.

    The outlier columns of ``input`` that ``index`` lists are added in their own dtype.
    """
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    zeros = None
    # Tensor cores take int8: the zero point 128 is subtracted from uint8 elements, and 128 times
    # the sum of each row of b corrects the sums.
    if a.dtype == torch.uint8:
        a, zeros = (a ^ 128).view(torch.int8), b.sum(1, dtype=torch.int32) * 128
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((m, n), dtype=dtype)
    if out.numel() == 0:
        return out
    # Each step over K costs a barrier, so that BLOCK_K is as large as shared memory allows.
    tile = (16, 32, 256, 4, 4) if m <= 16 else (128, 128, 128, 8, 3)
    # The float32 products of outliers need more registers than a large tile leaves.
    in_fp32 = input is not None and input.dtype == torch.float32
    if m > 16 and (in_fp32 or triton.cdiv(m, 128) * triton.cdiv(n, 128) < 96):
        tile = (64, 64, 128, 4, 4)
    kind = "int8" if input is None else "int8 outliers"
    if found := settings.settings(kind, out, (m, n, k)):
        tile = tuple(found[option] for option in TILE[:5])
    block_m, block_n, block_k, warps, stages = tile
    _product_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        a,
        b,
        a_scale.contiguous(),
        b_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        zeros,
        index,
        input,
        m,
        n,
        k,
        a.stride(0),
        b.stride(0),
        *((0, 0) if input is None else input.stride()),
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def linear(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    vnni_weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    threshold: float,
) -> Tensor:
    """Return the result of ``llmos::int8_linear``; CPUs alone use ``vnni_weight``."""
    m, k = input.shape
    marks = index = None
    if threshold and input.numel():
        marks = input.new_zeros(k, dtype=torch.int32)
        index = input.new_empty(k + 1, dtype=torch.int32)
        mark_kernel[(triton.cdiv(m, 32) * triton.cdiv(k, 128),)](
            input, marks, threshold, m, k, *input.stride(), BLOCK_M=32, BLOCK_K=128
        )
    rows, scale = quantize_rows(input, marks, index, 127)
    return _matmul(
        rows,
        weight_int8,
        scale,
        weight_scale,
        bias,
        activation,
        input.dtype,
        index,
        None if index is None else input,
    )


def linear_rows(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    vnni_weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """Return the rows and scales of ``llmos::int8_linear_rows``; CPUs alone use ``vnni_weight``."""
    y = linear(input, weight_int8, weight_scale, vnni_weight, bias, activation, 0.0)
    return quantize_rows(y, None, None, 255 if activation in (RELU, RELU2) else 127)


def weight_only(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    """Return the result of ``llmos::int8_weight_only``; raise ValueError for too many rows."""
    m, n = input.shape[0], weight_int8.shape[0]
    if m > WEIGHT_ONLY_ROWS:
        raise ValueError(f"input must have at most {WEIGHT_ONLY_ROWS} rows, got {m}")
    weight = weight_int8 if weight_int8.stride(1) == 1 else weight_int8.contiguous()
    out = input.new_empty(m, n)
    if out.numel() == 0:
        return out
    # A tensor core instruction takes 8 columns, so that two warps share the 16 columns of a tile,
    # and further warps would convert the same weights again. BLOCK_K is large to keep enough loads
    # in flight, since there are few thread blocks.
    block_k = 32 if input.dtype == torch.float32 else 256
    _weight_only_kernel[(triton.cdiv(n, 16),)](
        input,
        weight,
        weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        m,
        n,
        input.shape[1],
        *input.stride(),
        weight.stride(0),
        ACTIVATION=activation,
        BLOCK_M=16,
        BLOCK_N=16,
        BLOCK_K=block_k,
        num_warps=2,
        num_stages=4,
    )
    return out


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for dtype, rows, k, n in pack_shapes.products():
        input, bias = torch.empty(rows, k, dtype=dtype), torch.empty(n, dtype=dtype)
        weight, scale = torch.empty(n, k, dtype=torch.int8), torch.empty(n)
        for activation in (NONE, RELU, GELU, GELU_TANH) if k < n else (NONE,):
            for threshold in (0.0, 6.0):
                yield linear, (input, weight, scale, None, bias, activation, threshold)
            if activation == RELU:
                unsigned = torch.empty(rows, n, dtype=torch.uint8), torch.empty(rows)
                second, scales = torch.empty(k, n, dtype=torch.int8), torch.empty(k)
                last = input[0], NONE, dtype
                yield matmul, (unsigned[0], second, unsigned[1], scales, None, *last)
                yield linear_rows, (input, weight, scale, None, bias, activation)
            if rows <= WEIGHT_ONLY_ROWS:
                yield weight_only, (input, weight, scale, bias, activation)
