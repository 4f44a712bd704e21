"""Triton kernels of the embedding sum with its normalisation; formulas in ``ops/embedding.py``.

The forward reads each table's rows once and writes y once, up to ``WIDEST`` columns. The backward
writes h again (and the dropped gradient), for the kernels of ``layer_norm_backward``. An index
outside its table reads nothing and gives a row of NaN.
"""

import torch
import triton
import triton.language as tl

from llmos_kernels._triton.norm import layer_norm, layer_norm_backward
from llmos_kernels._triton.norm.layer_norm import WIDEST, scale_and_shift, standardize
from llmos_kernels._triton.rows import as_rows, dropout_arguments, dropout_factors, tile
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel

_SIZES = ["N", "count0", "count1", "count2", "rows0", "rows1", "rows2", "threshold"]
#: Columns of a program of the kernels that work on pieces of rows.
_BLOCK = 1024


@triton.jit
def _row(index, count, table, stride, rows, row, col, inside):
    at = tl.load(index + row % count)
    known = (at >= 0) & (at < rows)
    v = tl.load(table + tl.where(known, at, 0) * stride + col, inside & known, 0.0)
    return tl.where(known, v.to(tl.float32), float("nan"))


@triton.jit
def _sum(index0, index1, index2, count0, count1, count2, table0, table1, table2,
         stride0, stride1, stride2, rows0, rows1, rows2, row, col, inside):  # fmt: skip
    """The rows of all tables added in order, rounded where torch rounds; as float32."""
    v = _row(index0, count0, table0, stride0, rows0, row, col, inside)
    if table1 is not None:
        v += _row(index1, count1, table1, stride1, rows1, row, col, inside)
        v = v.to(table0.dtype.element_ty).to(tl.float32)
    if table2 is not None:
        v += _row(index2, count2, table2, stride2, rows2, row, col, inside)
        v = v.to(table0.dtype.element_ty).to(tl.float32)
    return v


@kernel(do_not_specialize=_SIZES)
def _forward_kernel(index0, index1, index2, count0, count1, count2, table0, table1, table2,
                    stride0, stride1, stride2, rows0, rows1, rows2, weight, bias, seed, y, stats,
                    N, D, eps, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (col < D)
    v = _sum(index0, index1, index2, count0, count1, count2, table0, table1, table2,
             stride0, stride1, stride2, rows0, rows1, rows2, row, col, inside)  # fmt: skip
    v = standardize(v, stats, row, inside, N, D, eps, True)
    v = scale_and_shift(v, weight, bias, col, col < D)
    if seed is not None:
        factors = dropout_factors(seed, row, 0, threshold, scale, ROWS, BLOCK)
        v = v.to(y.dtype.element_ty).to(tl.float32) * factors
    tl.store(y + row * D + col, v, inside)


@kernel(do_not_specialize=_SIZES)
def _sum_kernel(index0, index1, index2, count0, count1, count2, table0, table1, table2,
                stride0, stride1, stride2, rows0, rows1, rows2, h, N, D, PIECES,
                BLOCK: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) // PIECES).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    col = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)[None, :]
    v = _sum(index0, index1, index2, count0, count1, count2, table0, table1, table2,
             stride0, stride1, stride2, rows0, rows1, rows2, row, col, col < D)  # fmt: skip
    tl.store(h + row * D + col, v, col < D)


@kernel(do_not_specialize=["threshold"])
def _drop_kernel(x, seed, out, stride, D, PIECES, threshold, scale, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // PIECES).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    first = (tl.program_id(0) % PIECES) * BLOCK
    col = first + tl.arange(0, BLOCK)[None, :]
    factors = dropout_factors(seed, row, first, threshold, scale, 1, BLOCK)
    v = tl.load(x + row * stride + col, col < D, 0.0).to(tl.float32)
    tl.store(out + row * D + col, v * factors, col < D)


def _sources(indices, tables, d):
    """The first fifteen arguments of a kernel."""
    counts = [0 if i is None else i.numel() for i in indices]
    views = [as_rows(t, d) for t in tables]
    rows = [0 if t is None else len(t) for t in tables]
    return *indices, *counts, *(t for t, _ in views), *(stride for _, stride in views), *rows


def _gather(sources, like, shape):
    """h, contiguous."""
    h = like.new_empty(shape)
    d = shape[-1]
    pieces = triton.cdiv(d, _BLOCK)
    n = h.numel() // d
    _sum_kernel[(n * pieces,)](*sources, h, n, d, pieces, BLOCK=_BLOCK, num_warps=4)
    return h


def _drop(x, p, seed):
    """dropout(x), contiguous."""
    d = x.shape[-1]
    out = x.new_empty(x.shape)
    x, stride = as_rows(x, d)
    pieces = triton.cdiv(d, _BLOCK)
    _drop_kernel[(x.numel() // d * pieces,)](
        x, seed, out, stride, d, pieces, *dropout_arguments(p), BLOCK=_BLOCK, num_warps=4
    )
    return out


def forward(
    index0, index1, index2, table0, table1, table2, weight, bias, eps, dropout_p, seed
):  # fmt: skip
    d = table0.shape[1]
    n = index0.numel() if d else 0
    shape = (*index0.shape, d)
    seed = seed if dropout_p else None
    if n == 0:
        return table0.new_empty(shape), table0.new_empty((2, n), dtype=torch.float32)
    sources = _sources((index0, index1, index2), (table0, table1, table2), d)
    if d > WIDEST:
        h = _gather(sources, table0, shape)
        y, stats = layer_norm.forward(h, weight, bias, d, eps, True)
        return y if seed is None else _drop(y, dropout_p, seed), stats
    y = table0.new_empty(shape)
    stats = table0.new_empty((2, n), dtype=torch.float32)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    # Three tables and Philox words: more of a row in each thread spills.
    rows, block, warps = tile("embedding", table0, d, per_thread=8)
    _forward_kernel[(triton.cdiv(n, rows),)](
        *sources, weight, bias, seed, y, stats, n, d, eps, *dropout_arguments(dropout_p),
        ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y, stats


def backward(
    dy, index0, index1, index2, table0, table1, table2, weight, stats, dropout_p, seed,
    weight_grad, bias_grad,
):  # fmt: skip
    d = dy.shape[-1]
    h = dy
    if dy.numel():
        h = _gather(_sources((index0, index1, index2), (table0, table1, table2), d), dy, dy.shape)
        dy = _drop(dy, dropout_p, seed) if dropout_p else dy
    dh, _, dweight, dbias = layer_norm_backward.backward(
        dy, None, h, weight, stats, d, True, 0.0, None, weight_grad, bias_grad
    )
    return dh, dweight, dbias


def variants():
    """See ``examples``."""
    index = torch.empty(64, dtype=torch.int64)
    for dtype in pack_shapes.DTYPES:
        for d in (512, 1024, 2048):
            table, weight = torch.empty(64, d, dtype=dtype), torch.empty(d, dtype=dtype)
            dy, stats = torch.empty(64, d, dtype=dtype), torch.empty(2, 64)
            for third in ((index, table), (None, None)):
                sources = (index, index, third[0], table, table, third[1])
                for p in (0.0, 0.1):
                    dropout = p, pack_shapes.seed()
                    yield forward, (*sources, weight, weight, 1e-5, *dropout)
                    yield backward, (dy, *sources, weight, stats, *dropout, True, True)
