"""Triton attention of few queries and many keys, as in decoding.

The keys are split into parts, and a second kernel merges the results of the parts in a fixed order.
The formulas are in ``ops/attention.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.attention.attend import attend
from llmos_kernels._triton.attention.scores import (
    LOG2E,
    TOP_LEFT,
    load_rows,
    store_rows,
)
from llmos_kernels._triton.attention.tiles import block_dim, tile_arguments
from llmos_kernels._triton.runtime.launch import kernel

#: The most queries of one key head for which the keys are split: all of them share a tile.
MAX_SPLIT_QUERIES = 16
#: The number of keys above which they are split, and the least length of a part.
MIN_SPLIT_KEYS = 256
#: The most parts of the keys: with 8 key heads they fill the 132 multiprocessors of a large GPU
#: twice.
_MAX_PARTS = 32


@kernel(do_not_specialize=["q_len", "k_len", "PARTS", "PART", "threshold", "KEY_HEADS", "ROWS"])
def _part_kernel(q, k, v, mask, padding, seed, partial, partial_stats, q_batch, q_head, q_row,
                 k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_row,
                 mask_col, padding_batch, padding_col, q_len, k_len, KEY_HEADS, GROUP, PARTS, PART,
                 ROWS, scale, softcap, threshold, factor,
                 CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_DV: tl.constexpr):  # fmt: skip
    """Store m, total and acc of all queries of one key head over PART keys, to be merged."""
    part = tl.program_id(0) % PARTS
    bh = (tl.program_id(0) // PARTS).to(tl.int64)
    b = bh // KEY_HEADS
    h = bh % KEY_HEADS
    r = tl.arange(0, BLOCK_M)
    exists = r < GROUP * q_len
    i = r % q_len
    head = h * GROUP + tl.minimum(r // q_len, GROUP - 1)
    query = load_rows(q + b * q_batch + head[:, None] * q_head, i, q_row, exists, D, BLOCK_D)
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    if mask is not None:
        mask += b * mask_batch + head[:, None] * mask_head
        if mask_row is not None:
            mask += i.to(tl.int64)[:, None] * mask_row
    if padding is not None:
        padding += b * padding_batch
    offset = 0 * k_len if CAUSAL == TOP_LEFT else k_len - q_len
    first = (part.to(tl.int64) * PART).to(tl.int32)
    at = bh * GROUP * q_len + r
    m, total, acc = attend(
        query,
        k,
        v,
        mask,
        padding,
        padding_col,
        seed,
        at[:, None],
        (i + offset)[:, None],
        first,
        tl.minimum(first + PART, k_len),
        offset,
        q_len - 1 + offset,
        k_row,
        v_row,
        mask_col,
        scale,
        softcap,
        threshold,
        factor,
        CAUSAL,
        BIAS,
        D,
        DV,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
    )
    at += part.to(tl.int64) * ROWS
    tl.store(partial_stats + at, tl.where(total == 0, float("-inf"), m), exists)
    tl.store(partial_stats + PARTS.to(tl.int64) * ROWS + at, total, exists)
    store_rows(partial, at, DV, exists, acc, DV, BLOCK_DV)


@kernel(do_not_specialize=["q_len", "PARTS", "HEADS", "ROWS"])
def _merge_kernel(partial, partial_stats, sinks, out, stats, q_len, HEADS, PARTS, ROWS,
                  DV: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Merge the parts of one row of out with its sink, and store its statistics."""
    at = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, MAX_PARTS)
    parts = part.to(tl.int64) * ROWS + at
    m = tl.load(partial_stats + parts, part < PARTS, float("-inf"))
    total = tl.load(partial_stats + PARTS.to(tl.int64) * ROWS + parts, part < PARTS, 0.0)
    largest = tl.max(m)
    bh = at // q_len
    if sinks is not None:
        sink = tl.load(sinks + bh % HEADS).to(tl.float32)
        largest = tl.maximum(largest, sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    rescale = tl.exp2((m - largest) * LOG2E)
    total = tl.sum(total * rescale)
    if sinks is not None:
        total += tl.exp2((sink - largest) * LOG2E)
    inverse = tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))
    acc = load_rows(partial, parts, DV, part < PARTS, DV, BLOCK_DV)
    acc = tl.sum(acc * (rescale * inverse)[:, None], 0)
    tl.store(stats + at, largest)
    tl.store(stats + at + ROWS, inverse)
    d = tl.arange(0, BLOCK_DV)
    out += ((bh // HEADS * q_len + at % q_len) * HEADS + bh % HEADS) * DV
    tl.store(out + d, acc.to(out.dtype.element_ty), d < DV)


def forward_in_parts(out: Tensor, stats: Tensor, sinks: Tensor | None, shared: dict) -> None:
    """Compute out and the statistics with the keys split into parts."""
    q, v = shared["q"], shared["v"]
    batch, kv_heads, k_len, dv = v.shape
    rows = stats[0].numel()
    blocks = tile_arguments("decode", q, dv)
    # The number of keys alone decides, so that the parts of a row do not depend on its batch.
    step = max(MIN_SPLIT_KEYS, triton.cdiv(k_len, _MAX_PARTS))
    step = triton.cdiv(step, blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    parts = triton.cdiv(k_len, step)
    partial = q.new_empty((parts, rows, dv), dtype=torch.float32)
    partial_stats = q.new_empty((2, parts, rows), dtype=torch.float32)
    _part_kernel[(parts * batch * kv_heads,)](
        **shared,
        partial=partial,
        partial_stats=partial_stats,
        KEY_HEADS=kv_heads,
        PARTS=parts,
        PART=step,
        ROWS=rows,
        **blocks,
    )
    _merge_kernel[(rows,)](
        partial,
        partial_stats,
        sinks,
        out,
        stats,
        q.shape[2],
        q.shape[1],
        parts,
        rows,
        dv,
        MAX_PARTS=_MAX_PARTS,
        BLOCK_DV=block_dim(dv),
        num_warps=4,
    )
