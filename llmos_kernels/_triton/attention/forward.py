"""Triton forward kernels of attention; the formulas are in ``ops/attention.py``.

A thread block holds a block of queries of one head and loops over the keys that they may see, with
an online softmax (Dao 2023). For few queries and many keys, as in decoding, the keys are split into
parts, and a second kernel merges the parts in a fixed order.

Memory traffic: query is read and out written once, key and value are read once for each block of
queries.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.attention.scores import (
    LEAST_SCALE,
    LOG2E,
    TOP_LEFT,
    block_dim,
    exponential,
    key_span,
    keys_inside,
    load_bool_mask,
    load_rows,
    logits,
    mask_arguments,
    query_block,
    store_rows,
    stride_arguments,
    thread_blocks_per_head,
    tile_arguments,
    tile_variant,
    varlen_arguments,
    with_unit_columns,
)
from llmos_kernels._triton.rows import dropout_arguments, dropout_factors
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel

#: The most queries of one key head for which the keys are split: all of them share a tile.
_MAX_SPLIT_QUERIES = 16
#: The number of keys above which they are split, and the least length of a part.
_MIN_SPLIT_KEYS = 256
#: The most parts of the keys: with 8 key heads they fill the 132 multiprocessors of a large GPU
#: twice.
_MAX_PARTS = 32


@triton.jit
def _step(m, total, acc, query, k, v, mask, attended, padding, padding_col, seed, dropout_row,
          start, last, k_first, k_stop, k_row, v_row, mask_col, scale, threshold, factor,
          EDGE: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr,
          DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
          BLOCK_DV: tl.constexpr):  # fmt: skip
    """Return m, total and acc after one more block of keys.

    m is the largest logit so far, total the sum of exponentials, acc the sum of weighted values.
    """
    col = start + tl.arange(0, BLOCK_N)
    inside = keys_inside(padding, padding_col, col, k_first, k_stop, EDGE)
    key = load_rows(k, col, k_row, inside, D, BLOCK_D)
    x = logits(
        query,
        key,
        mask + col.to(tl.int64)[None, :] * mask_col if BIAS else None,
        attended,
        inside[None, :] if EDGE else None,
        col[None, :],
        last if EDGE and CAUSAL else None,
        scale,
        BIAS,
    )
    largest = tl.max(x, 1)
    if not BIAS:
        largest *= tl.maximum(scale, LEAST_SCALE)
    largest = tl.maximum(m, largest)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    if BIAS or query.dtype == tl.float32:
        p = exponential(x, finite[:, None], scale, BIAS)
    else:
        # One fused multiply-add for each logit. total sums the same p, so that the rounding of m
        # cancels. The p of the backward pass differ from these by less than their rounding.
        p = tl.exp2(x * (tl.maximum(scale, LEAST_SCALE) * LOG2E) - (finite * LOG2E)[:, None])
    rescale = tl.exp2((m - finite) * LOG2E)
    total = total * rescale + tl.sum(p, 1)
    if seed is not None:
        p *= dropout_factors(seed, dropout_row, start, threshold, factor, BLOCK_M, BLOCK_N)
    value = load_rows(v, col, v_row, inside, DV, BLOCK_DV)
    acc = tl.dot(p.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
    return largest, total, acc


@triton.jit
def _attend(query, k, v, mask, padding, padding_col, seed, dropout_row, last, begin, end, low_limit,
            high_limit, k_row, v_row, mask_col, scale, threshold, factor, CAUSAL: tl.constexpr,
            BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Return m, total and acc of a block of queries over the keys [begin, end)."""
    k_first, k_stop, first, bounded, padded, stop = key_span(
        padding, padding_col, begin, end, low_limit, high_limit, CAUSAL, BLOCK_N
    )
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for edge in tl.static_range(2 if padding is None else 3):
        low = first if edge == 0 else (bounded if edge == 1 else padded)
        high = bounded if edge == 0 else (padded if edge == 1 else stop)
        for visited in range(0, high - low, BLOCK_N):
            start = low + visited
            if mask is not None and not BIAS:
                col = start + tl.arange(0, BLOCK_N)[None, :]
                attended = load_bool_mask(mask + col.to(tl.int64) * mask_col, col < k_stop)
                if tl.max(attended.to(tl.int32)) > 0:
                    m, total, acc = _step(
                        m,
                        total,
                        acc,
                        query,
                        k,
                        v,
                        mask,
                        attended,
                        padding,
                        padding_col,
                        seed,
                        dropout_row,
                        start,
                        last,
                        k_first,
                        k_stop,
                        k_row,
                        v_row,
                        mask_col,
                        scale,
                        threshold,
                        factor,
                        edge,
                        CAUSAL,
                        BIAS,
                        D,
                        DV,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_D,
                        BLOCK_DV,
                    )
            else:
                m, total, acc = _step(
                    m,
                    total,
                    acc,
                    query,
                    k,
                    v,
                    mask,
                    None,
                    padding,
                    padding_col,
                    seed,
                    dropout_row,
                    start,
                    last,
                    k_first,
                    k_stop,
                    k_row,
                    v_row,
                    mask_col,
                    scale,
                    threshold,
                    factor,
                    edge,
                    CAUSAL,
                    BIAS,
                    D,
                    DV,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK_DV,
                )
    return tl.where(m == float("-inf"), 0.0, m), total, acc


@kernel(
    do_not_specialize=["q_len", "k_len", "BLOCKS", "SEQUENCES", "BATCH_HEADS", "threshold", "HEADS"]
)
def _forward_kernel(q, k, v, mask, padding, cu_q, cu_k, seed, out, stats, q_batch, q_head, q_row,
                    k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_row,
                    mask_col, padding_batch, padding_col, q_len, k_len, HEADS, GROUP, BLOCKS,
                    SEQUENCES, BATCH_HEADS, scale, threshold, factor,
                    CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute out and the statistics of a block of queries of one head."""
    b, h, first_row, q_start, q_count, k_start, k_count, offset = query_block(
        cu_q, cu_k, q_len, k_len, HEADS, BLOCKS, SEQUENCES, CAUSAL, BLOCK_M
    )
    i = first_row + tl.arange(0, BLOCK_M)
    row = q_start + i
    q += b * q_batch + h * q_head
    k += b * k_batch + h // GROUP * k_head + k_start.to(tl.int64) * k_row
    v += b * v_batch + h // GROUP * v_head + k_start.to(tl.int64) * v_row
    if mask is not None:
        mask += b * mask_batch + h * mask_head
        if mask_row is not None:
            mask += tl.minimum(i, q_count - 1).to(tl.int64)[:, None] * mask_row
    if padding is not None:
        padding += b * padding_batch
    query = load_rows(q, row, q_row, i < q_count, D, BLOCK_D)
    at = (b * HEADS + h) * q_len + row
    m, total, acc = _attend(
        query,
        k,
        v,
        mask,
        padding,
        padding_col,
        seed,
        at[:, None],
        (i + offset)[:, None],
        0 * k_count,
        tl.where(first_row < q_count, k_count, 0),
        first_row + offset,
        tl.minimum(first_row + BLOCK_M, q_count) - 1 + offset,
        k_row,
        v_row,
        mask_col,
        scale,
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
    inverse = tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))
    tl.store(stats + at, m, i < q_count)
    tl.store(stats + BATCH_HEADS.to(tl.int64) * q_len + at, inverse, i < q_count)
    out += (b * q_len * HEADS + h) * DV
    store_rows(out, row, HEADS * DV, i < q_count, acc * inverse[:, None], DV, BLOCK_DV)


@kernel(do_not_specialize=["q_len", "k_len", "PARTS", "PART", "threshold", "KEY_HEADS", "ROWS"])
def _part_kernel(q, k, v, mask, padding, seed, partial, partial_stats, q_batch, q_head, q_row,
                 k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_row,
                 mask_col, padding_batch, padding_col, q_len, k_len, KEY_HEADS, GROUP, PARTS, PART,
                 ROWS, scale, threshold, factor,
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
    m, total, acc = _attend(
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
def _merge_kernel(partial, partial_stats, out, stats, q_len, HEADS, PARTS, ROWS, DV: tl.constexpr,
                  MAX_PARTS: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Merge the parts of one row of out, and store its statistics."""
    at = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, MAX_PARTS)
    parts = part.to(tl.int64) * ROWS + at
    m = tl.load(partial_stats + parts, part < PARTS, float("-inf"))
    total = tl.load(partial_stats + PARTS.to(tl.int64) * ROWS + parts, part < PARTS, 0.0)
    largest = tl.max(m)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    rescale = tl.exp2((m - largest) * LOG2E)
    total = tl.sum(total * rescale)
    inverse = tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))
    acc = load_rows(partial, parts, DV, part < PARTS, DV, BLOCK_DV)
    acc = tl.sum(acc * (rescale * inverse)[:, None], 0)
    tl.store(stats + at, largest)
    tl.store(stats + at + ROWS, inverse)
    bh = at // q_len
    d = tl.arange(0, BLOCK_DV)
    out += ((bh // HEADS * q_len + at % q_len) * HEADS + bh % HEADS) * DV
    tl.store(out + d, acc.to(out.dtype.element_ty), d < DV)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
    causal: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return out and the statistics of ``llmos::attention_forward``."""
    batch, heads, q_len, d = q.shape
    kv_heads, k_len, dv = v.shape[1:]
    out = q.new_empty((batch, q_len, heads, dv))
    stats = q.new_empty((2, batch, heads, q_len), dtype=torch.float32)
    if stats.numel() == 0:
        return out, stats
    q, k, v = (with_unit_columns(t) for t in (q, k, v))
    threshold, factor = dropout_arguments(dropout_p)
    shared = dict(
        q=q,
        k=k,
        v=v,
        seed=seed if dropout_p else None,
        q_len=q_len,
        k_len=k_len,
        GROUP=heads // kv_heads,
        scale=scale,
        threshold=threshold,
        factor=factor,
        CAUSAL=causal,
        D=d,
        DV=dv,
        BLOCK_D=block_dim(d),
        BLOCK_DV=block_dim(dv),
        **stride_arguments(q=q, k=k, v=v),
        **mask_arguments(attn_mask, padding),
    )
    if cu_q is None and heads // kv_heads * q_len <= _MAX_SPLIT_QUERIES and k_len > _MIN_SPLIT_KEYS:
        _forward_in_parts(out, stats, shared)
        return out, stats
    variant = tile_variant(attn_mask, padding, shared["seed"], cu_q)
    blocks = tile_arguments("forward", q, dv, variant)
    if (rows := max(triton.next_power_of_2(q_len), 16)) < blocks["BLOCK_M"]:
        blocks["BLOCK_M"] = rows
        if q.dtype != torch.float32:  # Fewer warps, since several would compute the same rows.
            blocks |= {"num_warps": min(blocks["num_warps"], max(rows // 16, 4)), "maxnreg": None}
    count = thread_blocks_per_head(cu_q, q_len, blocks["BLOCK_M"])
    _forward_kernel[(count * batch * heads,)](
        **shared,
        **varlen_arguments(cu_q, cu_k),
        out=out,
        stats=stats,
        HEADS=heads,
        BLOCKS=count,
        BATCH_HEADS=batch * heads,
        **blocks,
    )
    return out, stats


def _forward_in_parts(out: Tensor, stats: Tensor, shared: dict) -> None:
    """Compute out and the statistics with the keys split into parts."""
    q, v = shared["q"], shared["v"]
    batch, kv_heads, k_len, dv = v.shape
    rows = stats[0].numel()
    blocks = tile_arguments("decode", q, dv)
    # The number of keys alone decides, so that the parts of a row do not depend on its batch.
    step = max(_MIN_SPLIT_KEYS, triton.cdiv(k_len, _MAX_PARTS))
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


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield the launchers and arguments whose kernels the pack holds."""
    for call in pack_shapes.attention(pack_shapes.PLAIN_AND_MASKED):
        yield forward, call.forward()
    for call in pack_shapes.attention(pack_shapes.SHORT, lengths=(64, 60, 32, 28)):
        yield forward, call.forward()
    for call in pack_shapes.attention(pack_shapes.DECODED, queries=1):
        yield forward, call.forward()
