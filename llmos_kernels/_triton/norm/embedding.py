"""Triton kernels of the sum of embeddings and its LayerNorm.

The formulas are in ``ops/embedding.py``. Up to ``WIDEST`` columns, the forward kernel reads each
table's rows once and writes y once. The backward pass computes h again (and dropout of the
gradient) for the kernels of ``layer_norm_backward``. An index outside its table reads nothing and
gives a row of NaN.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.norm import layer_norm, layer_norm_backward
from llmos_kernels._triton.norm.layer_norm import WIDEST, scale_and_shift, standardize
from llmos_kernels._triton.rows import as_rows, dropout_arguments, dropout_factors, row_block
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel

_SIZES = ["N", "count0", "count1", "count2", "rows0", "rows1", "rows2", "threshold"]
#: Columns of a thread block in the kernels that split rows into pieces.
_BLOCK = 1024


@triton.jit
def _lookup(index, count, table, stride, rows, row, col, inside):
    """Return the table's row for index[row % count] as float32, or NaN if it is out of range."""
    at = tl.load(index + row % count)
    known = (at >= 0) & (at < rows)
    v = tl.load(table + tl.where(known, at, 0) * stride + col, inside & known, 0.0)
    return tl.where(known, v.to(tl.float32), float("nan"))


@triton.jit
def _add_rows(index0, index1, index2, count0, count1, count2, table0, table1, table2,
              stride0, stride1, stride2, rows0, rows1, rows2, row, col, inside):  # fmt: skip
    """Return the sum of the rows of all tables as float32, added and rounded as torch does."""
    v = _lookup(index0, count0, table0, stride0, rows0, row, col, inside)
    if table1 is not None:
        v += _lookup(index1, count1, table1, stride1, rows1, row, col, inside)
        v = v.to(table0.dtype.element_ty).to(tl.float32)
    if table2 is not None:
        v += _lookup(index2, count2, table2, stride2, rows2, row, col, inside)
        v = v.to(table0.dtype.element_ty).to(tl.float32)
    return v


@kernel(do_not_specialize=_SIZES)
def _forward_kernel(index0, index1, index2, count0, count1, count2, table0, table1, table2, stride0,
                    stride1, stride2, rows0, rows1, rows2, weight, bias, seed, y, stats, N, D, eps,
                    threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Compute y and the statistics of a block of whole rows."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (col < D)
    v = _add_rows(
        index0,
        index1,
        index2,
        count0,
        count1,
        count2,
        table0,
        table1,
        table2,
        stride0,
        stride1,
        stride2,
        rows0,
        rows1,
        rows2,
        row,
        col,
        inside,
    )
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
    """Store a piece of one row of h."""
    row = (tl.program_id(0) // PIECES).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    col = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)[None, :]
    v = _add_rows(
        index0,
        index1,
        index2,
        count0,
        count1,
        count2,
        table0,
        table1,
        table2,
        stride0,
        stride1,
        stride2,
        rows0,
        rows1,
        rows2,
        row,
        col,
        col < D,
    )
    tl.store(h + row * D + col, v, col < D)


@kernel(do_not_specialize=["threshold"])
def _drop_kernel(x, seed, out, stride, D, PIECES, threshold, scale, BLOCK: tl.constexpr):
    """Store a piece of one row of dropout(x)."""
    row = (tl.program_id(0) // PIECES).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    first = (tl.program_id(0) % PIECES) * BLOCK
    col = first + tl.arange(0, BLOCK)[None, :]
    factors = dropout_factors(seed, row, first, threshold, scale, 1, BLOCK)
    v = tl.load(x + row * stride + col, col < D, 0.0).to(tl.float32)
    tl.store(out + row * D + col, v * factors, col < D)


def _table_arguments(
    indices: Sequence[Tensor | None], tables: Sequence[Tensor | None], d: int
) -> tuple:
    """Return the first fifteen arguments of a kernel: index0 to rows2."""
    counts = [0 if i is None else i.numel() for i in indices]
    views = [as_rows(t, d) for t in tables]
    rows = [0 if t is None else len(t) for t in tables]
    return *indices, *counts, *(t for t, _ in views), *(stride for _, stride in views), *rows


def _embedding_sum(sources: tuple, like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return h, contiguous, from the result of ``_table_arguments``."""
    h = like.new_empty(shape)
    d = shape[-1]
    pieces = triton.cdiv(d, _BLOCK)
    n = h.numel() // d
    _sum_kernel[(n * pieces,)](*sources, h, n, d, pieces, BLOCK=_BLOCK, num_warps=4)
    return h


def _dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return dropout(x), contiguous."""
    d = x.shape[-1]
    out = x.new_empty(x.shape)
    x, stride = as_rows(x, d)
    pieces = triton.cdiv(d, _BLOCK)
    _drop_kernel[(x.numel() // d * pieces,)](
        x, seed, out, stride, d, pieces, *dropout_arguments(p), BLOCK=_BLOCK, num_warps=4
    )
    return out


def forward(
    index0: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    table0: Tensor,
    table1: Tensor | None,
    table2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the statistics of ``llmos::embedding_layer_norm_forward``."""
    d = table0.shape[1]
    n = index0.numel() if d else 0
    shape = (*index0.shape, d)
    seed = seed if dropout_p else None
    if n == 0:
        return table0.new_empty(shape), table0.new_empty((2, n), dtype=torch.float32)
    sources = _table_arguments((index0, index1, index2), (table0, table1, table2), d)
    if d > WIDEST:
        h = _embedding_sum(sources, table0, shape)
        y, stats = layer_norm.forward(h, weight, bias, d, eps, True)
        return y if seed is None else _dropout(y, dropout_p, seed), stats
    y = table0.new_empty(shape)
    stats = table0.new_empty((2, n), dtype=torch.float32)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    # Three tables and the Philox words take registers: with more elements per thread they spill.
    rows, block, warps = row_block("embedding", table0, d, per_thread=8)
    _forward_kernel[(triton.cdiv(n, rows),)](
        *sources,
        weight,
        bias,
        seed,
        y,
        stats,
        n,
        d,
        eps,
        *dropout_arguments(dropout_p),
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return y, stats


def backward(
    dy: Tensor,
    index0: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    table0: Tensor,
    table1: Tensor | None,
    table2: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh, dweight and dbias of ``llmos::embedding_layer_norm_backward``."""
    d = dy.shape[-1]
    h = dy
    if dy.numel():
        sources = _table_arguments((index0, index1, index2), (table0, table1, table2), d)
        h = _embedding_sum(sources, dy, dy.shape)
        dy = _dropout(dy, dropout_p, seed) if dropout_p else dy
    dh, _, dweight, dbias = layer_norm_backward.backward(
        dy, None, h, weight, stats, d, True, 0.0, None, weight_grad, bias_grad
    )
    return dh, dweight, dbias


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
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
