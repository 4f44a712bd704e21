"""Triton backward kernels of LayerNorm and RMSNorm; the formulas are in ``ops/layer_norm.py``.

A fixed number of thread blocks loops over the rows. Each accumulates a partial sum (a share) of the
weight and bias gradients in registers, and a second kernel adds the shares in a fixed order:
without atomics, every run gives the same bits. Wider rows are read in blocks of columns instead,
and another kernel sums their weight and bias gradients.

Memory traffic of the first way: dy and h (and dh) are read once, dresidual (and dx) are written
once.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.rows import as_rows, dropout_arguments, dropout_factors, row_block
from llmos_kernels._triton.runtime import launch, pack_shapes
from llmos_kernels._triton.runtime.launch import kernel

#: The bytes of the widest row that fits the registers of a thread block beside its gradient sums.
_WIDEST = 16384
_WIDE_BLOCK, _WIDE_WARPS = 4096, 8
#: The multiprocessors of a large GPU. Each has registers for three thread blocks of 8 warps or two
#: of 16; in float32 fewer fit at a time.
_MULTIPROCESSORS = 132


@triton.jit
def _store_gradients(v, seed, dresidual, dx, at, row, first_col, threshold, scale, inside,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Store v as dresidual and, with dropout, its product with the dropout factors as dx."""
    v = v.to(dresidual.dtype.element_ty)
    tl.store(dresidual + at, v, inside)
    if seed is not None:
        factors = dropout_factors(seed, row, first_col, threshold, scale, ROWS, BLOCK)
        tl.store(dx + at, v.to(tl.float32) * factors, inside)


@kernel(do_not_specialize=["N", "threshold"])
def _backward_kernel(dy, dh, h, weight, stats, seed, dresidual, dx, dweight, dbias, dy_stride,
                     dh_stride, h_stride, N, D, threshold, scale,
                     CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Compute dresidual and dx of some rows, and this thread block's share of dweight and dbias."""
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, ROWS)[:, None].to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    rstds = stats + N.to(tl.int64) if CENTER else stats
    # Each of the ROWS rows has a sum of its own: adding rows up in each step would be a reduction
    # across all warps.
    dweight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    if weight is not None:
        w = tl.load(weight + col, col < D, 0.0).to(tl.float32)
    for first in range(pid * ROWS, N, tl.num_programs(0).to(tl.int64) * ROWS):
        row = first + lane
        inside = (row < N) & (col < D)
        g = tl.load(dy + row * dy_stride + col, inside, 0.0).to(tl.float32)
        x_hat = tl.load(h + row * h_stride + col, inside, 0.0).to(tl.float32)
        if CENTER:
            x_hat -= tl.load(stats + row, row < N, 0.0)
        rstd = tl.load(rstds + row, row < N, 0.0)
        x_hat *= rstd
        if dweight is not None:
            dweight_sum += g * x_hat
        if dbias is not None:
            dbias_sum += g
        if weight is not None:
            g *= w
        v = g - x_hat * (tl.sum(tl.where(inside, g * x_hat, 0.0), 1, keep_dims=True) / D)
        if CENTER:
            v -= tl.sum(g, 1, keep_dims=True) / D
        v *= rstd
        if dh is not None:
            v += tl.load(dh + row * dh_stride + col, inside, 0.0).to(tl.float32)
        _store_gradients(
            v, seed, dresidual, dx, row * D + col, row, 0, threshold, scale, inside, ROWS, BLOCK
        )
    if dweight is not None:
        tl.store(dweight + pid * D + col, tl.sum(dweight_sum, 0, keep_dims=True), col < D)
    if dbias is not None:
        tl.store(dbias + pid * D + col, tl.sum(dbias_sum, 0, keep_dims=True), col < D)


@kernel(do_not_specialize=["N", "threshold"])
def _backward_wide_kernel(dy, dh, h, weight, stats, seed, dresidual, dx, dy_stride, dh_stride,
                          h_stride, N, D, threshold, scale,
                          CENTER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Compute dresidual and dx of one row, in blocks of columns."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    lane = tl.arange(0, BLOCK)[None, :]
    mean = tl.load(stats + row) if CENTER else tl.zeros((1, 1), tl.float32)
    rstd = tl.load(stats + row + N.to(tl.int64)) if CENTER else tl.load(stats + row)
    sum_g = tl.zeros((1, BLOCK), tl.float32)
    sum_gx = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, D, BLOCK):
        col = first + lane
        g = tl.load(dy + row * dy_stride + col, col < D, 0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + col, col < D, 0.0).to(tl.float32)
        x_hat = (tl.load(h + row * h_stride + col, col < D, 0.0).to(tl.float32) - mean) * rstd
        sum_g += g
        sum_gx += tl.where(col < D, g * x_hat, 0.0)
    mean_g = tl.sum(sum_g, 1, keep_dims=True) / D
    mean_gx = tl.sum(sum_gx, 1, keep_dims=True) / D
    for first in range(0, D, BLOCK):
        col = first + lane
        g = tl.load(dy + row * dy_stride + col, col < D, 0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + col, col < D, 0.0).to(tl.float32)
        x_hat = (tl.load(h + row * h_stride + col, col < D, 0.0).to(tl.float32) - mean) * rstd
        v = g - x_hat * mean_gx
        if CENTER:
            v -= mean_g
        v *= rstd
        if dh is not None:
            v += tl.load(dh + row * dh_stride + col, col < D, 0.0).to(tl.float32)
        _store_gradients(
            v, seed, dresidual, dx, row * D + col, row, first, threshold, scale, col < D, 1, BLOCK
        )


@kernel(do_not_specialize=["N"])
def _weight_gradient_kernel(dy, h, stats, dweight, dbias, dy_stride, h_stride, N, D, CHUNK, CHUNKS,
                            CENTER: tl.constexpr, ROWS: tl.constexpr,
                            BLOCK: tl.constexpr):  # fmt: skip
    """Sum the weight and bias gradients of CHUNK rows over a block of columns."""
    chunk = (tl.program_id(0) % CHUNKS).to(tl.int64)
    col = (tl.program_id(0) // CHUNKS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    rstds = stats + N.to(tl.int64) if CENTER else stats
    dweight_sum = tl.zeros((1, BLOCK), tl.float32)
    dbias_sum = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + first + tl.arange(0, ROWS)[:, None]
        exists = (row < N) & (first + tl.arange(0, ROWS)[:, None] < CHUNK)
        inside = exists & (col < D)
        g = tl.load(dy + row * dy_stride + col, inside, 0.0).to(tl.float32)
        x_hat = tl.load(h + row * h_stride + col, inside, 0.0).to(tl.float32)
        if CENTER:
            x_hat -= tl.load(stats + row, exists, 0.0)
        x_hat *= tl.load(rstds + row, exists, 0.0)
        dweight_sum += tl.sum(g * x_hat, 0, keep_dims=True)
        dbias_sum += tl.sum(g, 0, keep_dims=True)
    if dweight is not None:
        tl.store(dweight + chunk * D + col, dweight_sum, col < D)
    if dbias is not None:
        tl.store(dbias + chunk * D + col, dbias_sum, col < D)


@kernel
def _sum_kernel(partial, out, SHARES, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store out[c] = the sum of partial[:, c], added in a fixed order."""
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, SHARES, ROWS):
        share = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        total += tl.load(partial + share * D + col, (share < SHARES) & (col < D), 0.0)
    tl.store(out + col, tl.sum(total, 0, keep_dims=True), col < D)


def _registers(like: Tensor, per_thread: int, warps: int) -> int | None:
    """Return the register limit of a thread, or None for ptxas's own choice.

    There is a limit where ptxas would choose so many that fewer thread blocks fit
    a multiprocessor, and where the limit spills no register.
    """
    if like.element_size() != 2 or per_thread > 8:
        return None
    if warps == 16:
        return 64 if launch.has_wgmma(like.device) else None
    return 80 if warps == 8 else None


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    d: int,
    center: bool,
    dropout_p: float,
    seed: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    """Return dresidual, dx, dweight and dbias of ``llmos::layer_norm_backward``."""
    n = h.numel() // d if d else 0
    dtype = stats.dtype if weight is None else weight.dtype
    dresidual = h.new_empty(h.shape)
    dx = h.new_empty(h.shape if dropout_p else 0)
    if n == 0:
        return (
            dresidual,
            dx,
            h.new_zeros(d if weight_grad else 0, dtype=dtype),
            h.new_zeros(d if bias_grad else 0, dtype=dtype),
        )
    dy, dy_stride = as_rows(dy, d)
    dh, dh_stride = as_rows(dh, d)
    h, h_stride = as_rows(h, d)
    weight = None if weight is None else weight.contiguous()
    stats = stats.contiguous()
    seed = seed if dropout_p else None
    wide = d * h.element_size() > _WIDEST
    rows, block, warps = row_block("layer_norm backward", h, d, per_thread=8)
    resident = _MULTIPROCESSORS * (3 if warps <= 8 else 2)
    shares = min(triton.cdiv(n, rows), resident) if not wide else min(n, 32)
    partials = [
        h.new_empty((shares, d), dtype=torch.float32) if wanted else None
        for wanted in (weight_grad, bias_grad)
    ]
    sizes = (n, d, *dropout_arguments(dropout_p), center)
    if not wide:
        _backward_kernel[(shares,)](
            dy,
            dh,
            h,
            weight,
            stats,
            seed,
            dresidual,
            dx,
            *partials,
            dy_stride,
            dh_stride,
            h_stride,
            *sizes,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
            maxnreg=_registers(h, rows * block // (32 * warps), warps),
        )
    else:
        _backward_wide_kernel[(n,)](
            dy,
            dh,
            h,
            weight,
            stats,
            seed,
            dresidual,
            dx,
            dy_stride,
            dh_stride,
            h_stride,
            *sizes,
            BLOCK=_WIDE_BLOCK,
            num_warps=_WIDE_WARPS,
        )
        if weight_grad or bias_grad:
            _weight_gradient_kernel[(triton.cdiv(d, 256) * shares,)](
                dy,
                h,
                stats,
                *partials,
                dy_stride,
                h_stride,
                n,
                d,
                triton.cdiv(n, shares),
                shares,
                center,
                ROWS=8,
                BLOCK=256,
                num_warps=4,
            )
    gradients = [_sum_shares(p, h, d, dtype) for p in partials]
    return dresidual, dx, *gradients


def _sum_shares(partial: Tensor | None, like: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """Return the sum [d] of ``partial`` [shares, d], or an empty tensor for None."""
    if partial is None:
        return like.new_empty(0, dtype=dtype)
    out = like.new_empty(d, dtype=dtype)
    grid = (triton.cdiv(d, 64),)
    _sum_kernel[grid](partial, out, len(partial), d, ROWS=32, BLOCK=64, num_warps=4)
    return out


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for x, weight, bias, d, center in pack_shapes.norms():
        stats = torch.empty(2 if center else 1, len(x))
        parameters = True, bias is not None
        # The norm alone, and the norm with residual and dropout.
        yield backward, (x, None, x, weight, stats, d, center, 0.0, None, *parameters)
        for p in (0.0, 0.1):
            yield backward, (x, x, x, weight, stats, d, center, p, pack_shapes.seed(), *parameters)
