"""Triton kernels of a linear layer with its activation and dropout; formulas in ``ops/linear.py``.

A program owns a tile of out, whose bias, activation and dropout are made in registers; where the sum
is in parts, by the kernel that adds them.
Bytes: out and kept once, input once for each block of columns, the weight once for each block of rows.
Of a weight stored by columns few rows load only the columns where input is not 0.
"""

import torch
import triton
import triton.language as tl

from llmos_kernels._triton import examples, persistent
from llmos_kernels._triton.activation import activate, dropout_options
from llmos_kernels._triton.launch import kernel
from llmos_kernels._triton.products import (
    add_parts,
    halves,
    multiply,
    new_parts,
    part_plan,
    place,
    plan,
    store_part,
)
from llmos_kernels._triton.rows import dropout_factors
from llmos_kernels.ops._activations import GELU, GELU_TANH, NONE, RELU, keeps_input

#: Up to so many rows a weight stored by columns is read only where input is not 0.
_SKIP_ROWS = 4


@triton.jit
def _finish(acc, bias, seed, out, kept, row, first_col, M, N, threshold, scale,
            ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out and kept of the rows ``row`` and BLOCK_N columns from ``first_col`` on, by 32 columns: the
    registers of a whole tile's activation and dropout would not leave room for a second program."""
    if BLOCK_N > 32:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _finish(left, bias, seed, out, kept, row, first_col, M, N, threshold, scale, ACTIVATION,
                BLOCK_M, BLOCK_N // 2)  # fmt: skip
        _finish(right, bias, seed, out, kept, row, first_col + BLOCK_N // 2, M, N, threshold, scale,
                ACTIVATION, BLOCK_M, BLOCK_N // 2)  # fmt: skip
    else:
        col = first_col + tl.arange(0, BLOCK_N)
        inside = (row < M)[:, None] & (col < N)[None, :]
        at = row[:, None] * N + col[None, :]
        if bias is not None:
            acc += tl.load(bias + col, col < N, 0.0).to(tl.float32)[None, :]
        z = acc.to(out.dtype.element_ty)
        if kept is not None:
            tl.store(kept + at, z, inside)
        y = activate(z.to(tl.float32), ACTIVATION)
        if seed is not None:
            y *= dropout_factors(seed, row[:, None], first_col, threshold, scale, BLOCK_M, BLOCK_N)
        tl.store(out + at, y, inside)


@kernel(do_not_specialize=["M", "threshold"])
def _forward_kernel(input, weight, bias, seed, out, kept, partial, M, N, K, PARTS, STEP,
                    input_row, input_col, weight_row, weight_col, threshold, scale,
                    ACTIVATION: tl.constexpr, SKIP: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    part, first_row, first_col = place(M, N, PARTS, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    acc = multiply(input, weight, row, col, part, M, N, K, STEP, input_row, input_col, weight_col,
                   weight_row, SKIP, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if partial is not None:
        store_part(partial, acc, part, row, col, M, N)
    else:
        _finish(acc, bias, seed, out, kept, row, first_col, M, N, threshold, scale, ACTIVATION,
                BLOCK_M, BLOCK_N)  # fmt: skip


@kernel(do_not_specialize=["M", "threshold"])
def _persistent_forward_kernel(a, b, bias, seed, out, kept, M, N, K, threshold, scale,
                               ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
                               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The forward kernel over tensor descriptors of input and weight."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_row, first_col = persistent.place(tile, M, N, BLOCK_M, BLOCK_N)
        acc = persistent.multiply(a, b, first_row, first_col, K, True, BLOCK_M, BLOCK_N, BLOCK_K)
        row = first_row + tl.arange(0, BLOCK_M)
        _finish(acc, bias, seed, out, kept, row, first_col, M, N, threshold, scale, ACTIVATION,
                BLOCK_M, BLOCK_N)  # fmt: skip


@kernel(do_not_specialize=["M", "PARTS", "threshold"])
def _parts_kernel(partial, bias, seed, out, kept, M, N, PARTS, threshold, scale,
                    ACTIVATION: tl.constexpr, SHARES: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr):  # fmt: skip
    """out and kept from parts of the product."""
    _, first_row, first_col = place(M, N, 1, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    acc = add_parts(partial, row, col, PARTS, M, N, SHARES, BLOCK_M, BLOCK_N)
    _finish(acc, bias, seed, out, kept, row, first_col, M, N, threshold, scale, ACTIVATION, BLOCK_M,
            BLOCK_N)  # fmt: skip


def forward(input, weight, bias, activation, dropout_p, seed, keep):
    (m, k), n = input.shape, weight.shape[0]
    out = input.new_empty((m, n))
    kept = input.new_empty((m, n) if keep else 0)
    if out.numel() == 0:
        return out, kept
    finish = dict(
        bias=None if bias is None else bias.contiguous(), out=out, kept=kept if keep else None, M=m,
        N=n, ACTIVATION=activation, **dropout_options(dropout_p, seed),
    )  # fmt: skip
    if planned := persistent.plan("linear", input, weight, turned=True):
        grid, blocks = planned
        _persistent_forward_kernel[grid](K=k, **finish, **blocks)
        return out, kept
    skip = m <= _SKIP_ROWS and weight.stride(0) == 1
    grid, blocks = plan("linear", input, m, n, k, (n if skip else k) % 16 != 0, skip)
    partial = new_parts(input, blocks["PARTS"], m, n)
    _forward_kernel[grid](
        input=input, weight=weight, partial=partial, K=k, input_row=input.stride(0),
        input_col=input.stride(1), weight_row=weight.stride(0), weight_col=weight.stride(1),
        SKIP=skip, **finish, **blocks,
    )  # fmt: skip
    if partial is not None:
        grid, blocks = part_plan(m, n, blocks["PARTS"])
        _parts_kernel[grid](partial=partial, **finish, **blocks)
    return out, kept


def variants():
    """See ``examples``."""
    for dtype, rows, k, n in examples.products():
        input, weight, bias = (torch.empty(s, dtype=dtype) for s in ((rows, k), (n, k), n))
        if k < n:
            for activation in (RELU, GELU, GELU_TANH):
                keep = keeps_input(activation)
                yield forward, (input, weight, bias, activation, 0.0, None, False)
                for p in (0.0, 0.1) if rows > 16 else ():
                    yield forward, (input, weight, bias, activation, p, examples.seed(), keep)
            yield forward, (input, weight, None, RELU, 0.0, None, False)
        elif rows <= _SKIP_ROWS:
            by_columns = torch.empty(k, n, dtype=dtype).mT
            yield forward, (input, by_columns, bias, NONE, 0.0, None, False)
