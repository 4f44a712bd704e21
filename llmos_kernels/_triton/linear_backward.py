"""Triton kernels of the gradients of a linear layer; formulas in ``ops/linear.py``.

dinput is multiplied by the slopes of the layer below in registers, and leaves its sums over a block of
rows for the gradient of the bias there. The programs of dweight that share columns of dout share the
work of summing them. No atomics: a second kernel adds sums in order.
Bytes: dinput, kept and dweight once, dout once for each block of columns.
"""

import torch
import triton
import triton.language as tl

from llmos_kernels._triton import examples, persistent
from llmos_kernels._triton.activation import derivative, dropout_options
from llmos_kernels._triton.launch import kernel
from llmos_kernels._triton.products import (
    add_parts,
    halves,
    multiply,
    new_parts,
    part_plan,
    part_span,
    place,
    plan,
    store_part,
    sum_parts,
)
from llmos_kernels._triton.rows import dropout_factors
from llmos_kernels.ops._activations import GELU, GELU_TANH, RELU


@triton.jit
def _finish(acc, kept, seed, dinput, sums, row, first_row, first_col, M, N, kept_row, kept_col,
            threshold, scale, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """dinput of the rows ``row`` and BLOCK_N columns from ``first_col`` on, and their sums."""
    if BLOCK_N > 32:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _finish(left, kept, seed, dinput, sums, row, first_row, first_col, M, N, kept_row, kept_col,
                threshold, scale, ACTIVATION, BLOCK_M, BLOCK_N // 2)  # fmt: skip
        _finish(right, kept, seed, dinput, sums, row, first_row, first_col + BLOCK_N // 2, M, N,
                kept_row, kept_col, threshold, scale, ACTIVATION, BLOCK_M, BLOCK_N // 2)  # fmt: skip
    else:
        col = first_col + tl.arange(0, BLOCK_N)
        inside = (row < M)[:, None] & (col < N)[None, :]
        if kept is not None:
            if seed is not None:
                acc *= dropout_factors(
                    seed, row[:, None], first_col, threshold, scale, BLOCK_M, BLOCK_N
                )
            z = tl.load(kept + row[:, None] * kept_row + col[None, :] * kept_col, inside, 0.0)
            acc *= derivative(z.to(tl.float32), ACTIVATION)
            total = tl.sum(tl.where(inside, acc, 0.0), 0)
            tl.store(sums + first_row // BLOCK_M * N + col, total, col < N)
        tl.store(dinput + row[:, None] * N + col[None, :], acc, inside)


@kernel(do_not_specialize=["M", "threshold"])
def _dinput_kernel(dout, weight, kept, seed, dinput, sums, partial, M, N, K, PARTS, STEP, dout_row,
                   dout_col, weight_row, weight_col, kept_row, kept_col, threshold, scale,
                   ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    part, first_row, first_col = place(M, N, PARTS, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    acc = multiply(dout, weight, row, col, part, M, N, K, STEP, dout_row, dout_col, weight_row,
                   weight_col, False, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if partial is not None:
        store_part(partial, acc, part, row, col, M, N)
    else:
        _finish(acc, kept, seed, dinput, sums, row, first_row, first_col, M, N, kept_row, kept_col,
                threshold, scale, ACTIVATION, BLOCK_M, BLOCK_N)  # fmt: skip


@kernel(do_not_specialize=["M", "threshold"])
def _persistent_dinput_kernel(a, b, kept, seed, dinput, sums, M, N, K, kept_row, kept_col, threshold,
                              scale, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
                              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The dinput kernel over tensor descriptors of dout and weight."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_row, first_col = persistent.place(tile, M, N, BLOCK_M, BLOCK_N)
        acc = persistent.multiply(a, b, first_row, first_col, K, False, BLOCK_M, BLOCK_N, BLOCK_K)
        row = first_row + tl.arange(0, BLOCK_M)
        _finish(acc, kept, seed, dinput, sums, row, first_row, first_col, M, N, kept_row, kept_col,
                threshold, scale, ACTIVATION, BLOCK_M, BLOCK_N)  # fmt: skip


@kernel(do_not_specialize=["M", "PARTS", "threshold"])
def _parts_kernel(partial, kept, seed, dinput, sums, M, N, PARTS, kept_row, kept_col, threshold,
                    scale, ACTIVATION: tl.constexpr, SHARES: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr):  # fmt: skip
    """dinput and its sums from parts of the product."""
    _, first_row, first_col = place(M, N, 1, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    acc = add_parts(partial, row, col, PARTS, M, N, SHARES, BLOCK_M, BLOCK_N)
    _finish(acc, kept, seed, dinput, sums, row, first_row, first_col, M, N, kept_row, kept_col,
            threshold, scale, ACTIVATION, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit
def _sum_share(dout, sums, row, part, share, SHARES, M, K, STEP, dout_row, dout_col,
               BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The sums of the columns ``row`` of dout over one of SHARES pieces of a part of its rows."""
    first, length, rest = part_span(part, K, STEP)
    piece = tl.cdiv(tl.cdiv(length, BLOCK_K), SHARES) * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    dout += row[:, None] * dout_col
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    stop = tl.minimum((share + 1) * piece, length)
    for start in tl.range(share * piece, stop, BLOCK_K, num_stages=4):
        at = dout + (first + start + k)[None, :] * dout_row
        total += tl.load(at, (row < M)[:, None] & (k < rest - start)[None, :], 0.0).to(tl.float32)
    at = (part.to(tl.int64) * SHARES + share) * M + row
    tl.store(sums + at, tl.sum(total, 1), row < M)


@kernel(do_not_specialize=["K"])
def _dweight_kernel(dout, input, dweight, sums, partial, M, N, K, PARTS, STEP, dout_row,
                    dout_col, input_row, input_col,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    part, first_row, first_col = place(M, N, PARTS, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    if sums is not None:
        _sum_share(dout, sums, row, part, (first_col // BLOCK_N).to(tl.int32), tl.cdiv(N, BLOCK_N),
                   M, K, STEP, dout_row, dout_col, BLOCK_M, BLOCK_K)  # fmt: skip
    acc = multiply(dout, input, row, col, part, M, N, K, STEP, dout_col, dout_row, input_row,
                   input_col, False, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if partial is not None:
        store_part(partial, acc, part, row, col, M, N)
    else:
        inside = (row < M)[:, None] & (col < N)[None, :]
        tl.store(dweight + row[:, None] * N + col[None, :], acc, inside)


def dinput(dout, weight, kept, activation, dropout_p, seed):
    (m, k), n = dout.shape, weight.shape[1]
    out = dout.new_empty((m, n))
    dbias = dout.new_empty(0 if kept is None else n)
    if out.numel() == 0:
        return out, dbias.zero_()
    planned, partial = persistent.plan("linear dinput", dout, weight, turned=False), None
    grid, blocks = last_grid, last = planned or plan(
        "linear dinput", dout, m, n, k, (n | k) % 16 != 0
    )
    if not planned:
        partial = new_parts(dout, blocks["PARTS"], m, n)
    if partial is not None:
        last_grid, last = part_plan(m, n, blocks["PARTS"])
    sums, kept_row, kept_col = None, 0, 0
    if kept is not None:
        sums = new_parts(dout, triton.cdiv(m, last["BLOCK_M"]), n)
        kept_row, kept_col = kept.stride()
    finish = dict(
        kept=kept, dinput=out, sums=dbias if sums is None else sums, M=m, N=n, kept_row=kept_row,
        kept_col=kept_col, ACTIVATION=activation, **dropout_options(dropout_p, seed),
    )  # fmt: skip
    if planned:
        _persistent_dinput_kernel[grid](K=k, **finish, **blocks)
    else:
        _dinput_kernel[grid](
            dout=dout, weight=weight, partial=partial, K=k, dout_row=dout.stride(0),
            dout_col=dout.stride(1), weight_row=weight.stride(0), weight_col=weight.stride(1),
            **finish, **blocks,
        )  # fmt: skip
    if partial is not None:
        _parts_kernel[last_grid](partial=partial, **finish, **last)
    if sums is not None:
        sum_parts(sums, dbias)
    return out, dbias


def dweight(dout, input, bias):
    (k, m), n = dout.shape, input.shape[1]
    out = dout.new_empty((m, n))
    dbias = dout.new_empty(m if bias else 0)
    if out.numel() == 0:  # Nothing to multiply, hence no program that could sum dout.
        return out, dout.sum(0, dtype=torch.float32).to(dout.dtype) if bias else dbias
    grid, blocks = plan("linear dweight", dout, m, n, k, (m | n) % 16 != 0)
    partial = new_parts(dout, blocks["PARTS"], m, n)
    sums = new_parts(dout, blocks["PARTS"] * triton.cdiv(n, blocks["BLOCK_N"]), m) if bias else None
    own = dbias if bias and sums is None else sums
    _dweight_kernel[grid](
        dout=dout, input=input, dweight=out, sums=own, partial=partial, M=m, N=n, K=k,
        dout_row=dout.stride(0), dout_col=dout.stride(1), input_row=input.stride(0),
        input_col=input.stride(1), **blocks,
    )  # fmt: skip
    if partial is not None:
        sum_parts(partial, out)
    if sums is not None:
        sum_parts(sums, dbias)
    return out, dbias


def variants():
    """See ``examples``. Nobody calls ``dweight`` on a GPU: cuBLAS answers where nothing is fused."""
    for dtype, rows, k, n in examples.products():
        if k < n and rows > 16:
            dout, weight, kept = (
                torch.empty(s, dtype=dtype) for s in ((rows, k), (k, n), (rows, n))
            )
            for activation in (RELU, GELU, GELU_TANH):
                for p in (0.0, 0.1):
                    yield dinput, (dout, weight, kept, activation, p, examples.seed())
