"""Triton kernel of the gradient of attention's float mask.

The formulas are in ``ops/attention.py``. A thread block computes a tile of the gradient, which has
the mask's own shape, and sums over everything that the tile was broadcast to: there are no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.attention.scores import (
    TOP_LEFT,
    load_rows,
    readable_keys,
    tile_weights,
)
from llmos_kernels._triton.attention.tiles import tile_arguments
from llmos_kernels._triton.runtime.launch import kernel


@kernel(
    do_not_specialize=[
        "q_len",
        "k_len",
        "BATCHES",
        "ROWS",
        "threshold",
        "HEADS",
        "MASK_BATCHES",
        "MASK_HEADS",
    ]
)
def _dmask_kernel(q, k, v, dout, mask, padding, seed, stats, delta, dmask, q_batch, q_head, q_row,
                  k_batch, k_head, k_row, v_batch, v_head, v_row, dout_batch, dout_head, dout_row,
                  mask_batch, mask_head, mask_row, mask_col, padding_batch, padding_col, q_len,
                  k_len, HEADS, GROUP, BATCHES, ROWS, MASK_BATCHES, MASK_HEADS, scale, softcap,
                  threshold, factor, CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr,
                  DV: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLS: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_DV: tl.constexpr):  # fmt: skip
    """Store a tile of dmask: the sum over everything that its part of the mask was broadcast to."""
    q_blocks = tl.cdiv(q_len, BLOCK_M)
    k_blocks = tl.cdiv(k_len, BLOCK_N)
    mask_rows = q_len
    mask_cols = k_len
    summed_rows = 1
    summed_cols = 1
    if SUM_ROWS:
        mask_rows, summed_rows, q_blocks = q_len * 0 + 1, q_blocks, q_len * 0 + 1
    if SUM_COLS:
        mask_cols, summed_cols, k_blocks = k_len * 0 + 1, k_blocks, k_len * 0 + 1
    tile = tl.program_id(0)
    k_block = tile % k_blocks
    q_block = tile // k_blocks % q_blocks
    mask_bh = (tile // k_blocks // q_blocks).to(tl.int64)
    mask_h = mask_bh % MASK_HEADS
    mask_b = mask_bh // MASK_HEADS
    heads = HEADS // MASK_HEADS
    count = BATCHES // MASK_BATCHES * heads * summed_rows * summed_cols
    offset = 0 * k_len if CAUSAL == TOP_LEFT else k_len - q_len
    if CAUSAL and not (SUM_ROWS or SUM_COLS):
        last_row = tl.minimum(q_block * BLOCK_M + BLOCK_M, q_len) - 1
        count = tl.where(k_block * BLOCK_N <= last_row + offset, count, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(0, count):
        start = (k_block + n % summed_cols) * BLOCK_N
        i = (q_block + n // summed_cols % summed_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
        bh = n // summed_cols // summed_rows
        h = mask_h + bh % heads
        b = mask_b + bh // heads
        exists = i < q_len
        col = start + tl.arange(0, BLOCK_N)
        padding_b = padding
        if padding is not None:
            padding_b += b * padding_batch
        inside = readable_keys(padding_b, padding_col, col, k_len)
        key = load_rows(k + b * k_batch + h // GROUP * k_head, col, k_row, inside, D, BLOCK_D)
        value = load_rows(v + b * v_batch + h // GROUP * v_head, col, v_row, inside, DV, BLOCK_DV)
        query = load_rows(q + b * q_batch + h * q_head, i, q_row, exists, D, BLOCK_D)
        d_out = load_rows(dout + b * dout_batch + h * dout_head, i, dout_row, exists, DV, BLOCK_DV)
        mask_at = mask + b * mask_batch + h * mask_head + col.to(tl.int64)[None, :] * mask_col
        if mask_row is not None:
            mask_at += tl.minimum(i, q_len - 1).to(tl.int64)[:, None] * mask_row
        at = (b * HEADS + h) * q_len + i
        m = tl.load(stats + at, exists, float("inf"))[:, None]
        inverse = tl.load(stats + ROWS.to(tl.int64) + at, exists, 0.0)[:, None]
        d = tl.load(delta + at, exists, 0.0)[:, None]
        p, dp, _ = tile_weights(
            query,
            key,
            value,
            d_out,
            m,
            inverse,
            mask_at,
            None,
            inside[None, :],
            col[None, :],
            (i + offset)[:, None] if CAUSAL else None,
            seed,
            at[:, None],
            start,
            scale,
            softcap,
            threshold,
            factor,
            BIAS,
            BLOCK_M,
            BLOCK_N,
        )
        acc += p * (dp - d)
    row = (q_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    col = (k_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    if SUM_ROWS:
        acc = tl.sum(acc, 0, keep_dims=True)
        row = tl.zeros((1, 1), tl.int64)
    if SUM_COLS:
        acc = tl.sum(acc, 1, keep_dims=True)
        col = tl.zeros((1, 1), tl.int64)
    to = dmask + (mask_bh * mask_rows + row) * mask_cols + col
    tl.store(to, acc.to(dmask.dtype.element_ty), (row < mask_rows) & (col < mask_cols))


def launch_dmask(dmask: Tensor, shared: dict, batch: int, heads: int) -> None:
    """Compute ``dmask``; ``shared`` are the arguments that all backward kernels take."""
    q, v = shared["q"], shared["v"]
    mask_batches, mask_heads, mask_rows, mask_cols = dmask.shape
    blocks = tile_arguments("dmask", q, v.shape[-1])
    tiles = triton.cdiv(mask_rows, blocks["BLOCK_M"]) * triton.cdiv(mask_cols, blocks["BLOCK_N"])
    _dmask_kernel[(tiles * mask_batches * mask_heads,)](
        **shared,
        dmask=dmask,
        HEADS=heads,
        BATCHES=batch,
        MASK_BATCHES=mask_batches,
        MASK_HEADS=mask_heads,
        SUM_ROWS=mask_rows != q.shape[2],
        SUM_COLS=mask_cols != v.shape[2],
        **blocks,
    )
