"""Triton forward kernels of attention; formulas in ``ops/attention.py``.

A program holds a block of queries of one head and walks over the keys that they may see, with the
softmax computed as it goes (Dao 2023). Few queries and many keys, as in decoding: the keys are
split, and a second kernel merges the parts in order.
Bytes: query and out once, key and value once for each block of queries.
"""

import torch
import triton
import triton.language as tl

from llmos_kernels._triton.attention.scores import (
    LEAST_SCALE,
    LOG2E,
    TOP_LEFT,
    attends,
    block_dim,
    exponential,
    key_span,
    keys_inside,
    load_of,
    load_rows,
    logits,
    mask_arguments,
    packed_arguments,
    query_block,
    slots,
    store_rows,
    stride_arguments,
    tile,
    with_unit_columns,
)
from llmos_kernels._triton.rows import dropout_arguments, dropout_factors
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel

#: Queries of one key head that share a tile, and keys from which on they are split.
_FEW_QUERIES, _MANY_KEYS = 16, 256
#: Parts of the keys: with 8 key heads they fill the 132 multiprocessors of a large GPU twice.
_MOST_PARTS = 32


@triton.jit
def _step(m, total, acc, query, k, v, mask, attended, padding, padding_col, seed, drawn, start, last,
          k_first, k_stop, k_row, v_row, mask_col, scale, threshold, factor,
          EDGE: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
          D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of keys into the largest logit m, the sum total and the weighted values acc."""
    col = start + tl.arange(0, BLOCK_N)
    inside = keys_inside(padding, padding_col, col, k_first, k_stop, EDGE)
    key = load_rows(k, col, k_row, inside, D, BLOCK_D)
    x = logits(query, key, mask + col.to(tl.int64)[None, :] * mask_col if BIAS else None, attended,
               inside[None, :] if EDGE else None, col[None, :], last if EDGE and CAUSAL else None,
               scale, BIAS)  # fmt: skip
    largest = tl.max(x, 1)
    if not BIAS:
        largest *= tl.maximum(scale, LEAST_SCALE)
    largest = tl.maximum(m, largest)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    if BIAS or query.dtype == tl.float32:
        p = exponential(x, finite[:, None], scale, BIAS)
    else:
        # One fused product for each logit: the sum is of the same p, so what m loses cancels. The
        # backward's p differ from these by less than they are rounded.
        p = tl.exp2(x * (tl.maximum(scale, LEAST_SCALE) * LOG2E) - (finite * LOG2E)[:, None])
    shrink = tl.exp2((m - finite) * LOG2E)
    total = total * shrink + tl.sum(p, 1)
    if seed is not None:
        p *= dropout_factors(seed, drawn, start, threshold, factor, BLOCK_M, BLOCK_N)
    value = load_rows(v, col, v_row, inside, DV, BLOCK_DV)
    acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return largest, total, acc


@triton.jit
def _walk(query, k, v, mask, padding, padding_col, seed, drawn, last, begin, end, least, most,
          k_row, v_row, mask_col, scale, threshold, factor, CAUSAL: tl.constexpr,
          BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """m, total and acc of a tile of queries over the keys [begin, end)."""
    k_first, k_stop, first, whole, holes, stop = key_span(
        padding, padding_col, begin, end, least, most, CAUSAL, BLOCK_N
    )
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for edge in tl.static_range(2 if padding is None else 3):
        low = first if edge == 0 else (whole if edge == 1 else holes)
        high = whole if edge == 0 else (holes if edge == 1 else stop)
        for walked in range(0, high - low, BLOCK_N):
            start = low + walked
            if mask is not None and not BIAS:
                col = start + tl.arange(0, BLOCK_N)[None, :]
                attended = attends(mask + col.to(tl.int64) * mask_col, col < k_stop)
                if tl.max(attended.to(tl.int32)) > 0:
                    m, total, acc = _step(
                        m, total, acc, query, k, v, mask, attended, padding, padding_col, seed,
                        drawn, start, last, k_first, k_stop, k_row, v_row, mask_col, scale,
                        threshold, factor, edge, CAUSAL, BIAS, D, DV, BLOCK_M, BLOCK_N, BLOCK_D,
                        BLOCK_DV,
                    )  # fmt: skip
            else:
                m, total, acc = _step(
                    m, total, acc, query, k, v, mask, None, padding, padding_col, seed, drawn,
                    start, last, k_first, k_stop, k_row, v_row, mask_col, scale, threshold, factor,
                    edge, CAUSAL, BIAS, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
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
    m, total, acc = _walk(
        query, k, v, mask, padding, padding_col, seed, at[:, None], (i + offset)[:, None],
        0 * k_count, tl.where(first_row < q_count, k_count, 0), first_row + offset,
        tl.minimum(first_row + BLOCK_M, q_count) - 1 + offset, k_row, v_row, mask_col, scale, threshold,
        factor, CAUSAL, BIAS, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
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
    """All queries of one key head over PART keys: m, total and acc before they are merged."""
    part = tl.program_id(0) % PARTS
    bh = (tl.program_id(0) // PARTS).to(tl.int64)
    b = bh // KEY_HEADS
    h = bh % KEY_HEADS
    r = tl.arange(0, BLOCK_M)
    real = r < GROUP * q_len
    i = r % q_len
    head = h * GROUP + tl.minimum(r // q_len, GROUP - 1)
    query = load_rows(q + b * q_batch + head[:, None] * q_head, i, q_row, real, D, BLOCK_D)
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
    m, total, acc = _walk(
        query, k, v, mask, padding, padding_col, seed, at[:, None], (i + offset)[:, None], first,
        tl.minimum(first + PART, k_len), offset, q_len - 1 + offset, k_row, v_row, mask_col, scale,
        threshold, factor, CAUSAL, BIAS, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    at += part.to(tl.int64) * ROWS
    tl.store(partial_stats + at, tl.where(total == 0, float("-inf"), m), real)
    tl.store(partial_stats + PARTS.to(tl.int64) * ROWS + at, total, real)
    store_rows(partial, at, DV, real, acc, DV, BLOCK_DV)


@kernel(do_not_specialize=["q_len", "PARTS", "HEADS", "ROWS"])
def _merge_kernel(partial, partial_stats, out, stats, q_len, HEADS, PARTS, ROWS, DV: tl.constexpr,
                  MOST: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """One row of out from its parts."""
    at = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, MOST)
    parts = part.to(tl.int64) * ROWS + at
    m = tl.load(partial_stats + parts, part < PARTS, float("-inf"))
    total = tl.load(partial_stats + PARTS.to(tl.int64) * ROWS + parts, part < PARTS, 0.0)
    largest = tl.max(m)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    grow = tl.exp2((m - largest) * LOG2E)
    total = tl.sum(total * grow)
    inverse = tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))
    acc = load_rows(partial, parts, DV, part < PARTS, DV, BLOCK_DV)
    acc = tl.sum(acc * (grow * inverse)[:, None], 0)
    tl.store(stats + at, largest)
    tl.store(stats + at + ROWS, inverse)
    bh = at // q_len
    d = tl.arange(0, BLOCK_DV)
    out += ((bh // HEADS * q_len + at % q_len) * HEADS + bh % HEADS) * DV
    tl.store(out + d, acc.to(out.dtype.element_ty), d < DV)


def forward(q, k, v, attn_mask, padding, cu_q, cu_k, scale, causal, dropout_p, seed):
    batch, heads, q_len, d = q.shape
    kv_heads, k_len, dv = v.shape[1:]
    out = q.new_empty((batch, q_len, heads, dv))
    stats = q.new_empty((2, batch, heads, q_len), dtype=torch.float32)
    if stats.numel() == 0:
        return out, stats
    q, k, v = (with_unit_columns(t) for t in (q, k, v))
    threshold, factor = dropout_arguments(dropout_p)
    shared = dict(
        q=q, k=k, v=v, seed=seed if dropout_p else None, q_len=q_len, k_len=k_len,
        GROUP=heads // kv_heads, scale=scale, threshold=threshold, factor=factor, CAUSAL=causal,
        D=d, DV=dv, BLOCK_D=block_dim(d), BLOCK_DV=block_dim(dv),
        **stride_arguments(q=q, k=k, v=v), **mask_arguments(attn_mask, padding),
    )  # fmt: skip
    if cu_q is None and heads // kv_heads * q_len <= _FEW_QUERIES and k_len > _MANY_KEYS:
        _split_forward(out, stats, shared)
        return out, stats
    load = load_of(attn_mask, padding, shared["seed"], cu_q)
    blocks = tile("forward", q, dv, load)
    if (rows := max(triton.next_power_of_2(q_len), 16)) < blocks["BLOCK_M"]:
        blocks["BLOCK_M"] = rows
        if q.dtype != torch.float32:  # Else warps repeat each other's rows, see _TILES.
            blocks |= {"num_warps": min(blocks["num_warps"], max(rows // 16, 4)), "maxnreg": None}
    programs = slots(cu_q, q_len, blocks["BLOCK_M"])
    _forward_kernel[(programs * batch * heads,)](
        **shared, **packed_arguments(cu_q, cu_k), out=out, stats=stats, HEADS=heads,
        BLOCKS=programs, BATCH_HEADS=batch * heads, **blocks,
    )  # fmt: skip
    return out, stats


def _split_forward(out, stats, shared):
    q, v = shared["q"], shared["v"]
    batch, kv_heads, k_len, dv = v.shape
    rows = stats[0].numel()
    blocks = tile("decode", q, dv)
    # By the number of keys alone: the parts of a row do not depend on its batch.
    step = max(_MANY_KEYS, triton.cdiv(k_len, _MOST_PARTS))
    step = triton.cdiv(step, blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    parts = triton.cdiv(k_len, step)
    partial = q.new_empty((parts, rows, dv), dtype=torch.float32)
    partial_stats = q.new_empty((2, parts, rows), dtype=torch.float32)
    _part_kernel[(parts * batch * kv_heads,)](
        **shared, partial=partial, partial_stats=partial_stats, KEY_HEADS=kv_heads, PARTS=parts,
        PART=step, ROWS=rows, **blocks,
    )  # fmt: skip
    _merge_kernel[(rows,)](
        partial, partial_stats, out, stats, q.shape[2], q.shape[1], parts, rows, dv,
        MOST=_MOST_PARTS, BLOCK_DV=block_dim(dv), num_warps=4,
    )  # fmt: skip


def variants():
    """See ``examples``."""
    for call in pack_shapes.attention(pack_shapes.PLAIN_AND_MASKED):
        yield forward, call.forward()
    for call in pack_shapes.attention(pack_shapes.SHORT, lengths=(64, 60, 32, 28)):
        yield forward, call.forward()
    for call in pack_shapes.attention(pack_shapes.DECODED, queries=1):
        yield forward, call.forward()
