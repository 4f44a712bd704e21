"""Triton kernel of LayerNorm and RMSNorm with int8 results.

The formulas are in ``ops/int8_norm.py``. The kernel is the forward kernel of
``norm/layer_norm.py``, and quantizes the rows while they are in registers.

Memory traffic: x (and residual) are read once, rows (and h) are written once.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.int8.quantize import quantization_scale, quantize, round_to_integer
from llmos_kernels._triton.norm import layer_norm
from llmos_kernels._triton.rows import as_rows, row_block
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel


@kernel(do_not_specialize=["N"])
def _norm_kernel(x, residual, weight, bias, rows, scale, h, stats, x_stride, residual_stride, N, D,
                 eps, CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Compute the int8 rows, their scales and h of a block of whole rows."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (col < D)
    v = layer_norm.add_residual(
        x,
        residual,
        h,
        None,
        0,
        1.0,
        row,
        row * x_stride + col,
        row * residual_stride + col,
        row * D + col,
        inside,
        0,
        ROWS,
        BLOCK,
    )
    v = layer_norm.standardize(v, stats, row, inside, N, D, eps, CENTER)
    v = layer_norm.scale_and_shift(v, weight, bias, col, col < D)
    v = tl.where(inside, v.to(x.dtype.element_ty).to(tl.float32), 0.0)
    size = tl.abs(v)
    finite = tl.max((~(size < float("inf"))).to(tl.int32), 1, keep_dims=True) == 0
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), 1, keep_dims=True)
    stored, inverse = quantization_scale(largest, finite, 127)
    tl.store(scale + row, stored, row < N)
    v = tl.where(inverse > 0, v, 0.0) * inverse
    tl.store(rows + row * D + col, round_to_integer(v).to(tl.int8), inside)


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    d: int,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the int8 rows, their scales and h of ``llmos::int8_norm``."""
    n = x.numel() // d if d else 0
    if d > layer_norm.WIDEST or n == 0:
        if residual is None:
            y, h = layer_norm.forward(x, weight, bias, d, eps, center)[0], x.new_empty(0)
        else:
            y, h, _ = layer_norm.add_forward(x, residual, weight, bias, d, eps, center, 0.0, None)
        rows, scale = quantize(y.view(n, d))
        return rows.view(x.shape), scale, h
    rows = x.new_empty(x.shape, dtype=torch.int8)
    h = x.new_empty(0 if residual is None else x.shape)
    scale, stats = (x.new_empty(c * n, dtype=torch.float32) for c in (1, 2))
    x, x_stride = as_rows(x, d)
    residual, residual_stride = as_rows(residual, d)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    block_rows, block, warps = row_block("int8_norm", x, d)
    _norm_kernel[(triton.cdiv(n, block_rows),)](
        x,
        residual,
        weight,
        bias,
        rows,
        scale,
        h,
        stats,
        x_stride,
        residual_stride,
        n,
        d,
        eps,
        CENTER=center,
        ROWS=block_rows,
        BLOCK=block,
        num_warps=warps,
    )
    return rows, scale, h


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for x, weight, bias, d, center in pack_shapes.norms():
        for residual in (None, x):
            yield norm, (x, residual, weight, bias, d, 1e-5, center)
