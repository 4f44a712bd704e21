"""Triton kernel of the gradients of key and value; the formulas are in ``ops/attention.py``.

A thread block computes dkey and dvalue of a block of keys, over all query heads that share them,
from the recomputed attention weights p and from delta (``dquery.py``).
"""

import triton
import triton.language as tl

from llmos_kernels._triton.attention.scores import (
    TOP_LEFT,
    exponential,
    load_bool_mask,
    load_rows,
    logits,
    readable_keys,
    scores,
    sequence_and_block,
    sequence_span,
    store_rows,
    uncapped,
)
from llmos_kernels._triton.rows import dropout_factors
from llmos_kernels._triton.runtime.launch import kernel


@triton.jit
def _dkey_step(dk, dv, key, value, q, dout, stats, delta, mask, attended, inside, seed, at, start,
               col, q_count, offset, ROWS, q_row, dout_row, first_col, scale, softcap, threshold,
               factor, KEY_RANGE: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr,
               DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Return dk and dv after one more block of queries.

    Tiles are transposed here, [keys, queries]: the weights then are in the registers that the
    matrix products of dk and dv read them from.
    """
    i = start + tl.arange(0, BLOCK_M)
    exists = i < q_count
    at += i
    query = load_rows(q, i, q_row, exists, D, BLOCK_D)
    m = tl.load(stats + at, exists, float("inf"))[None, :]
    x = scores(key, query, scale, softcap)
    logit = logits(
        x,
        mask,
        attended,
        inside[:, None] if BIAS else None,
        col[:, None],
        (i + offset)[None, :] if KEY_RANGE else None,
        scale,
        softcap,
        BIAS,
    )
    p = exponential(logit, m, scale, BIAS or softcap is not None)
    p *= tl.load(stats + ROWS.to(tl.int64) + at, exists, 0.0)[None, :]
    d_out = load_rows(dout, i, dout_row, exists, DV, BLOCK_DV)
    dp = tl.dot(value, tl.trans(d_out), input_precision="ieee")
    dropped = p
    if seed is not None:
        factors = tl.trans(
            dropout_factors(seed, at[:, None], first_col, threshold, factor, BLOCK_M, BLOCK_N)
        )
        dropped *= factors
        dp *= factors
    dv = tl.dot(dropped.to(d_out.dtype), d_out, dv, input_precision="ieee")
    ds = p * (dp - tl.load(delta + at, exists, 0.0)[None, :])
    ds = uncapped(ds, x, softcap).to(query.dtype)
    return tl.dot(ds, query, dk, input_precision="ieee"), dv


@kernel(
    do_not_specialize=["q_len", "k_len", "BLOCKS", "SEQUENCES", "ROWS", "threshold", "KEY_HEADS"]
)
def dkey_kernel(q, k, v, dout, mask, padding, cu_q, cu_k, seed, stats, delta, dk, dv,
                q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                dout_batch, dout_head, dout_row, mask_batch, mask_head, mask_row, mask_col,
                padding_batch, padding_col, q_len, k_len, KEY_HEADS, GROUP, BLOCKS, SEQUENCES,
                ROWS, scale, softcap, threshold, factor,
                CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute dkey and dvalue of a block of keys of one key head."""
    bh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    b = bh // KEY_HEADS
    hk = bh % KEY_HEADS
    sequence, block = sequence_and_block(cu_k, SEQUENCES, k_len, tl.program_id(0) % BLOCKS, BLOCK_N)
    q_start, q_count = sequence_span(cu_q, sequence, SEQUENCES, q_len)
    k_start, k_count = sequence_span(cu_k, sequence, SEQUENCES, k_len)
    offset = 0 * k_count if CAUSAL == TOP_LEFT else k_count - q_count
    first_col = block * BLOCK_N
    col = first_col + tl.arange(0, BLOCK_N)
    if padding is not None:
        padding += b * padding_batch
    inside = readable_keys(padding, padding_col, col, k_count)
    key = load_rows(k + b * k_batch + hk * k_head, k_start + col, k_row, inside, D, BLOCK_D)
    value = load_rows(v + b * v_batch + hk * v_head, k_start + col, v_row, inside, DV, BLOCK_DV)
    # By the causal limit, queries before ``first`` see none of these keys, and queries from
    # ``bounded`` on see them all.
    first = 0 * q_count
    bounded = first
    stop = tl.where(tl.max(inside.to(tl.int32)) > 0, q_count, 0)
    if CAUSAL:
        first = tl.maximum(first_col - offset, 0) // BLOCK_M * BLOCK_M
        bounded = tl.maximum(first_col + BLOCK_N - 1 - offset, 0)
        bounded = (bounded + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        bounded = tl.maximum(tl.minimum(bounded, stop), first)
    dkey = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvalue = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for g in range(0, GROUP):
        h = hk * GROUP + g
        q_h = q + b * q_batch + h * q_head + q_start.to(tl.int64) * q_row
        dout_h = dout + b * dout_batch + h * dout_head + q_start.to(tl.int64) * dout_row
        at = (bh * GROUP + g) * q_len + q_start
        mask_h = mask
        if mask is not None:
            mask_h += b * mask_batch + h * mask_head + col.to(tl.int64)[:, None] * mask_col
        for seen in tl.static_range(0 if CAUSAL else 1, 2):
            low = bounded if seen else first
            for visited in range(0, (stop if seen else bounded) - low, BLOCK_M):
                start = low + visited
                mask_at = mask_h
                if mask_row is not None:
                    i = tl.minimum(start + tl.arange(0, BLOCK_M), q_count - 1)
                    mask_at += i.to(tl.int64)[None, :] * mask_row
                if mask is not None and not BIAS:
                    attended = load_bool_mask(mask_at, inside[:, None])
                    if tl.max(attended.to(tl.int32)) > 0:
                        dkey, dvalue = _dkey_step(
                            dkey,
                            dvalue,
                            key,
                            value,
                            q_h,
                            dout_h,
                            stats,
                            delta,
                            None,
                            attended,
                            inside,
                            seed,
                            at,
                            start,
                            col,
                            q_count,
                            offset,
                            ROWS,
                            q_row,
                            dout_row,
                            first_col,
                            scale,
                            softcap,
                            threshold,
                            factor,
                            1 - seen,
                            BIAS,
                            D,
                            DV,
                            BLOCK_M,
                            BLOCK_N,
                            BLOCK_D,
                            BLOCK_DV,
                        )
                else:
                    dkey, dvalue = _dkey_step(
                        dkey,
                        dvalue,
                        key,
                        value,
                        q_h,
                        dout_h,
                        stats,
                        delta,
                        mask_at,
                        None,
                        inside,
                        seed,
                        at,
                        start,
                        col,
                        q_count,
                        offset,
                        ROWS,
                        q_row,
                        dout_row,
                        first_col,
                        scale,
                        softcap,
                        threshold,
                        factor,
                        1 - seen,
                        BIAS,
                        D,
                        DV,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_D,
                        BLOCK_DV,
                    )
    dkey = tl.where(inside[:, None], dkey * scale, 0.0)
    dvalue = tl.where(inside[:, None], dvalue, 0.0)
    exists = col < k_count
    row = k_start + col
    store_rows(dk + (b * k_len * KEY_HEADS + hk) * D, row, KEY_HEADS * D, exists, dkey, D, BLOCK_D)
    store_rows(
        dv + (b * k_len * KEY_HEADS + hk) * DV, row, KEY_HEADS * DV, exists, dvalue, DV, BLOCK_DV
    )
