"""Triton forward kernels of LayerNorm and RMSNorm; the formulas are in ``ops/layer_norm.py``.

A thread block holds some whole rows in registers. For a row wider than ``WIDEST`` it loops over
blocks of columns instead, and reads the row again in each pass.

Memory traffic up to ``WIDEST``: x (and residual) are read once, y (and h) are written once.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.rows import as_rows, dropout_arguments, dropout_factors, row_block
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel

#: The widest row that fits the registers of a thread block: 32 floats in each of 512 threads.
WIDEST = 16384
_WIDE_BLOCK, _WIDE_WARPS = 4096, 8


@triton.jit
def add_residual(x, residual, h, seed, threshold, scale, row, x_at, residual_at, h_at, inside,
                 first_col, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Return h = residual + dropout(x) as float32, rounded where torch rounds.

    It also stores h if there is a residual.
    """
    v = tl.load(x + x_at, inside, 0.0)
    if seed is not None:
        factors = dropout_factors(seed, row, first_col, threshold, scale, ROWS, BLOCK)
        v = (v.to(tl.float32) * factors).to(x.dtype.element_ty)
    if residual is not None:
        v = v.to(tl.float32) + tl.load(residual + residual_at, inside, 0.0).to(tl.float32)
        v = v.to(x.dtype.element_ty)
        tl.store(h + h_at, v, inside)
    return v.to(tl.float32)


@triton.jit
def scale_and_shift(v, weight, bias, col, inside):
    """Return v * weight + bias; either may be None."""
    if weight is not None:
        v *= tl.load(weight + col, inside, 0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + col, inside, 0.0).to(tl.float32)
    return v


@triton.jit
def standardize(v, stats, row, inside, N, D, eps, CENTER: tl.constexpr):
    """Return (v - mean) * rstd of whole rows, and store their statistics."""
    if CENTER:
        mean = tl.sum(v, 1, keep_dims=True) / D
        delta = tl.where(inside, v - mean, 0.0)
        # The mean of the differences corrects the rounding of the mean, so that the variance of a
        # constant row is 0.
        shift = tl.sum(delta, 1, keep_dims=True) / D
        variance = tl.maximum(
            tl.sum(delta * delta, 1, keep_dims=True) / D - shift * shift,
            0.0,
            propagate_nan=tl.PropagateNan.ALL,
        )
        mean += shift
        v -= mean
        tl.store(stats + row, mean, row < N)
        stats += N.to(tl.int64)
    else:
        variance = tl.sum(v * v, 1, keep_dims=True) / D
    rstd = 1 / tl.sqrt(variance + eps)
    tl.store(stats + row, rstd, row < N)
    return v * rstd


@kernel(do_not_specialize=["N", "threshold"])
def _forward_kernel(x, residual, weight, bias, seed, y, h, stats, x_stride, residual_stride, N, D,
                    eps, threshold, scale,
                    CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Compute y, h and the statistics of a block of whole rows."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (col < D)
    v = add_residual(
        x,
        residual,
        h,
        seed,
        threshold,
        scale,
        row,
        row * x_stride + col,
        row * residual_stride + col,
        row * D + col,
        inside,
        0,
        ROWS,
        BLOCK,
    )
    v = standardize(v, stats, row, inside, N, D, eps, CENTER)
    v = scale_and_shift(v, weight, bias, col, col < D)
    tl.store(y + row * D + col, v, inside)


@kernel(do_not_specialize=["N", "threshold"])
def _forward_wide_kernel(x, residual, weight, bias, seed, y, h, stats, x_stride, residual_stride, N,
                         D, eps, threshold, scale, CENTER: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """Compute y, h and the statistics of one row, in blocks of columns."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, D, BLOCK):
        col = first + lane
        v = add_residual(
            x,
            residual,
            h,
            seed,
            threshold,
            scale,
            row,
            row * x_stride + col,
            row * residual_stride + col,
            row * D + col,
            col < D,
            first,
            1,
            BLOCK,
        )
        total += v if CENTER else v * v
    if residual is not None:
        # The loops below read elements of h that other threads of this thread block have written.
        tl.debug_barrier()
        x, x_stride = h, D
    mean = tl.sum(total, 1, keep_dims=True) / D
    variance = mean
    if CENTER:
        error = tl.zeros((1, BLOCK), tl.float32)
        square = tl.zeros((1, BLOCK), tl.float32)
        for first in range(0, D, BLOCK):
            col = first + lane
            v = tl.load(x + row * x_stride + col, col < D, 0.0).to(tl.float32)
            delta = tl.where(col < D, v - mean, 0.0)
            error += delta
            square += delta * delta
        shift = tl.sum(error, 1, keep_dims=True) / D
        variance = tl.maximum(
            tl.sum(square, 1, keep_dims=True) / D - shift * shift,
            0.0,
            propagate_nan=tl.PropagateNan.ALL,
        )
        mean += shift
        tl.store(stats + row, mean)
        stats += N.to(tl.int64)
    rstd = 1 / tl.sqrt(variance + eps)
    tl.store(stats + row, rstd)
    for first in range(0, D, BLOCK):
        col = first + lane
        v = tl.load(x + row * x_stride + col, col < D, 0.0).to(tl.float32)
        if CENTER:
            v -= mean
        v = scale_and_shift(v * rstd, weight, bias, col, col < D)
        tl.store(y + row * D + col, v, col < D)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, d: int, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """Return y and the statistics of ``llmos::layer_norm_forward``."""
    y, _, stats = _launch(x, None, weight, bias, d, eps, center, 0.0, None)
    return y, stats


def add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    d: int,
    eps: float,
    center: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h and the statistics of ``llmos::add_layer_norm_forward``."""
    return _launch(x, residual, weight, bias, d, eps, center, dropout_p, seed)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    d: int,
    eps: float,
    center: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple:
    """Return y, h (None without a residual) and the statistics."""
    n = x.numel() // d if d else 0
    y = x.new_empty(x.shape)
    h = None if residual is None else x.new_empty(x.shape)
    stats = x.new_empty((2 if center else 1, n), dtype=torch.float32)
    if n == 0:
        return y, h, stats
    x, x_stride = as_rows(x, d)
    residual, residual_stride = as_rows(residual, d)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tensors = x, residual, weight, bias, seed if dropout_p else None, y, h, stats
    sizes = x_stride, residual_stride, n, d, eps
    args = *tensors, *sizes, *dropout_arguments(dropout_p), center
    if d > WIDEST:
        _forward_wide_kernel[(n,)](*args, BLOCK=_WIDE_BLOCK, num_warps=_WIDE_WARPS)
    else:
        rows, block, warps = row_block("layer_norm", x, d)
        grid = (triton.cdiv(n, rows),)
        _forward_kernel[grid](*args, ROWS=rows, BLOCK=block, num_warps=warps)
    return y, h, stats


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for x, weight, bias, d, center in pack_shapes.norms():
        yield forward, (x, weight, bias, d, 1e-5, center)
        for p in (0.0, 0.1):
            yield add_forward, (x, x, weight, bias, d, 1e-5, center, p, pack_shapes.seed())
