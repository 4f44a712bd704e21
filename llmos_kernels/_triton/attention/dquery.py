"""Triton kernel of the gradient of query; the formulas are in ``ops/attention.py``.

A thread block computes dquery of a block of queries of one head from the recomputed attention
weights p. It also stores delta = sum(dout * out), which the kernels of the other gradients read.
"""

import triton
import triton.language as tl

from llmos_kernels._triton.attention.scores import (
    LOG2E,
    key_span,
    keys_inside,
    load_bool_mask,
    load_rows,
    query_block,
    store_rows,
    tile_weights,
    uncapped,
)
from llmos_kernels._triton.runtime.launch import kernel


@triton.jit
def _weights_of_keys(query, dout, m, inverse, k, v, mask, attended, padding, padding_col, seed,
                     dropout_row, start, last, k_first, k_stop, k_row, v_row, mask_col, scale,
                     softcap, threshold, factor, KEY_RANGE: tl.constexpr, CAUSAL: tl.constexpr,
                     BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_DV: tl.constexpr):  # fmt: skip
    """Return the tiles p, dp and ``scores`` of the keys from ``start`` on, and these keys."""
    col = start + tl.arange(0, BLOCK_N)
    inside = keys_inside(padding, padding_col, col, k_first, k_stop, KEY_RANGE)
    key = load_rows(k, col, k_row, inside, D, BLOCK_D)
    value = load_rows(v, col, v_row, inside, DV, BLOCK_DV)
    p, dp, x = tile_weights(
        query,
        key,
        value,
        dout,
        m,
        inverse,
        mask + col.to(tl.int64)[None, :] * mask_col if BIAS else None,
        attended,
        inside[None, :] if KEY_RANGE else None,
        col[None, :],
        last if KEY_RANGE and CAUSAL else None,
        seed,
        dropout_row,
        start,
        scale,
        softcap,
        threshold,
        factor,
        BIAS,
        BLOCK_M,
        BLOCK_N,
    )
    return p, dp, x, key


@kernel(do_not_specialize=["q_len", "k_len", "BLOCKS", "SEQUENCES", "ROWS", "threshold", "HEADS"])
def dquery_kernel(q, k, v, dout, out, mask, padding, cu_q, cu_k, sinks, seed, stats, delta, dq,
                  q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                  dout_batch, dout_head, dout_row, mask_batch, mask_head, mask_row, mask_col,
                  padding_batch, padding_col, q_len, k_len, HEADS, GROUP, BLOCKS, SEQUENCES, ROWS,
                  scale, softcap, threshold, factor,
                  CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                  PRECISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute dquery and delta of a block of queries of one head.

    With PRECISE delta is corrected for the rounding of ``out`` where all keys fit one tile; it is
    set for float32, and where k_len fits one tile.
    """
    b, h, first_row, q_start, q_count, k_start, k_count, offset = query_block(
        cu_q, cu_k, q_len, k_len, HEADS, BLOCKS, SEQUENCES, CAUSAL, BLOCK_M
    )
    i = first_row + tl.arange(0, BLOCK_M)
    row = q_start + i
    exists = i < q_count
    k += b * k_batch + h // GROUP * k_head + k_start.to(tl.int64) * k_row
    v += b * v_batch + h // GROUP * v_head + k_start.to(tl.int64) * v_row
    if mask is not None:
        mask += b * mask_batch + h * mask_head
        if mask_row is not None:
            mask += tl.minimum(i, q_count - 1).to(tl.int64)[:, None] * mask_row
    if padding is not None:
        padding += b * padding_batch
    at = (b * HEADS + h) * q_len + row
    m = tl.load(stats + at, exists, float("inf"))[:, None]
    inverse = tl.load(stats + ROWS.to(tl.int64) + at, exists, 0.0)[:, None]
    query = load_rows(q + b * q_batch + h * q_head, row, q_row, exists, D, BLOCK_D)
    d_out = load_rows(dout + b * dout_batch + h * dout_head, row, dout_row, exists, DV, BLOCK_DV)
    o = load_rows(out + (b * q_len * HEADS + h) * DV, row, HEADS * DV, exists, DV, BLOCK_DV)
    # delta is computed by a matrix product like that of dp, so that both round alike. Without
    # dropout, if a query sees a single key, out is its value, and dp - delta is exactly 0.
    diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
    total = tl.dot(d_out, tl.trans(o), input_precision="ieee")
    total = tl.sum(tl.where(diagonal, total, 0.0), 1)
    if sinks is not None:
        # The sink is a key with this weight whose dp is 0.
        p_sink = tl.exp2((tl.load(sinks + h).to(tl.float32) - m) * LOG2E) * inverse
        p_sink = tl.sum(p_sink, 1)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    k_first, k_stop, first, bounded, padded, stop = key_span(
        padding,
        padding_col,
        0 * k_count,  # The first key, as a value of the type of k_count.
        tl.where(first_row < q_count, k_count, 0),  # No key for blocks past the last query.
        first_row + offset,
        tl.minimum(first_row + BLOCK_M, q_count) - 1 + offset,
        CAUSAL,
        BLOCK_N,
    )
    last = (i + offset)[:, None]
    if PRECISE:
        # ``out`` was rounded, so sum(dout * out) has an error that dp lacks; it matters most with
        # few keys. If all keys fit one tile, delta is therefore the mean of dp weighted by p. The
        # sum of p, with the sink, is 1 up to rounding, or 0 if no key is visible.
        for start in range(first, tl.where(stop - first <= BLOCK_N, stop, first), BLOCK_N):
            attended = None
            if mask is not None and not BIAS:
                col = start + tl.arange(0, BLOCK_N)[None, :]
                attended = load_bool_mask(mask + col.to(tl.int64) * mask_col, col < k_stop)
            p, dp, _, _ = _weights_of_keys(
                query,
                d_out,
                m,
                inverse,
                k,
                v,
                mask,
                attended,
                padding,
                padding_col,
                seed,
                at[:, None],
                start,
                last,
                k_first,
                k_stop,
                k_row,
                v_row,
                mask_col,
                scale,
                softcap,
                threshold,
                factor,
                1 if padding is None else 2,
                CAUSAL,
                BIAS,
                D,
                DV,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
            )
            error = tl.sum(p * (dp - total[:, None]), 1)
            weight = tl.sum(p, 1)
            if sinks is not None:
                error -= p_sink * total
                weight += p_sink
            total += error / tl.maximum(weight, 0.5)
    else:
        tl.store(delta + at, total, exists)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:
        excess -= p_sink * total
    for key_range in tl.static_range(2 if padding is None else 3):
        low = first if key_range == 0 else (bounded if key_range == 1 else padded)
        high = bounded if key_range == 0 else (padded if key_range == 1 else stop)
        for visited in range(0, high - low, BLOCK_N):
            start = low + visited
            attended = None
            any_attended = True
            if mask is not None and not BIAS:
                col = start + tl.arange(0, BLOCK_N)[None, :]
                attended = load_bool_mask(mask + col.to(tl.int64) * mask_col, col < k_stop)
                any_attended = tl.max(attended.to(tl.int32)) > 0
            if any_attended:
                p, dp, x, key = _weights_of_keys(
                    query,
                    d_out,
                    m,
                    inverse,
                    k,
                    v,
                    mask,
                    attended,
                    padding,
                    padding_col,
                    seed,
                    at[:, None],
                    start,
                    last,
                    k_first,
                    k_stop,
                    k_row,
                    v_row,
                    mask_col,
                    scale,
                    softcap,
                    threshold,
                    factor,
                    key_range,
                    CAUSAL,
                    BIAS,
                    D,
                    DV,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK_DV,
                )
                ds = p * (dp - total[:, None])
                if PRECISE:
                    excess += tl.sum(ds, 1)
                ds = uncapped(ds, x, softcap).to(key.dtype)
                acc = tl.dot(ds, key, acc, input_precision="ieee")
    if PRECISE:
        # In exact arithmetic the sum of ds over keys and sink is 0. Its computed value is the
        # rounding error of delta, and is added to what the other kernels read.
        tl.store(delta + at, total + excess, exists)
    store_rows(dq + (b * q_len * HEADS + h) * D, row, HEADS * D, exists, acc * scale, D, BLOCK_D)
