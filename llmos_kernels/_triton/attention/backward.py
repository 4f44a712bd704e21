"""Triton backward kernels of attention; the formulas are in ``ops/attention.py``.

Three kernels recompute the attention weights p from the statistics. dquery: one thread block per
block of queries, which also stores delta = sum(dout * out) for the others, corrected for rounding.
dkey and dvalue: one thread block per block of keys, over all query heads that share them. The
gradient of a float mask (``backward_mask.py``): one thread block per tile, over everything that the
tile was broadcast to. There are no atomics, and nothing of shape [q_len, k_len] is stored but the
gradient of the mask.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.attention.backward_mask import launch_dmask
from llmos_kernels._triton.attention.scores import (
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
    readable_keys,
    sequence_and_block,
    sequence_span,
    store_rows,
    stride_arguments,
    thread_blocks_per_head,
    tile_arguments,
    tile_variant,
    tile_weights,
    varlen_arguments,
    with_unit_columns,
)
from llmos_kernels._triton.rows import dropout_arguments, dropout_factors
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel


@triton.jit
def _weights_of_keys(query, dout, m, inverse, k, v, mask, attended, padding, padding_col, seed,
                     dropout_row, start, last, k_first, k_stop, k_row, v_row, mask_col, scale,
                     threshold, factor, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
                     BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_DV: tl.constexpr):  # fmt: skip
    """Return the tiles p and dp of the keys from ``start`` on, and these keys."""
    col = start + tl.arange(0, BLOCK_N)
    inside = keys_inside(padding, padding_col, col, k_first, k_stop, EDGE)
    key = load_rows(k, col, k_row, inside, D, BLOCK_D)
    value = load_rows(v, col, v_row, inside, DV, BLOCK_DV)
    p, dp = tile_weights(
        query,
        key,
        value,
        dout,
        m,
        inverse,
        mask + col.to(tl.int64)[None, :] * mask_col if BIAS else None,
        attended,
        inside[None, :] if EDGE else None,
        col[None, :],
        last if EDGE and CAUSAL else None,
        seed,
        dropout_row,
        start,
        scale,
        threshold,
        factor,
        BIAS,
        BLOCK_M,
        BLOCK_N,
    )
    return p, dp, key


@kernel(do_not_specialize=["q_len", "k_len", "BLOCKS", "SEQUENCES", "ROWS", "threshold", "HEADS"])
def _dquery_kernel(q, k, v, dout, out, mask, padding, cu_q, cu_k, seed, stats, delta, dq,
                   q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                   dout_batch, dout_head, dout_row, mask_batch, mask_head, mask_row, mask_col,
                   padding_batch, padding_col, q_len, k_len, HEADS, GROUP, BLOCKS, SEQUENCES, ROWS,
                   scale, threshold, factor,
                   CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                   PRECISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute dquery and delta of a block of queries of one head."""
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
    # delta is computed by a matrix product like that of dp, so that both round alike. If a query
    # sees a single key, out is its value, and then dp - delta is exactly 0.
    diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
    total = tl.dot(d_out, tl.trans(o), input_precision="ieee")
    total = tl.sum(tl.where(diagonal, total, 0.0), 1)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    k_first, k_stop, first, bounded, padded, stop = key_span(
        padding,
        padding_col,
        0 * k_count,
        tl.where(first_row < q_count, k_count, 0),
        first_row + offset,
        tl.minimum(first_row + BLOCK_M, q_count) - 1 + offset,
        CAUSAL,
        BLOCK_N,
    )
    last = (i + offset)[:, None]
    if PRECISE:
        # ``out`` was rounded, so sum(dout * out) has an error that dp lacks; it matters most with
        # few keys. If all keys fit one tile, delta is therefore the mean of dp weighted by p. The
        # sum of p is 1 up to rounding, or 0 if no key is visible.
        for start in range(first, tl.where(stop - first <= BLOCK_N, stop, first), BLOCK_N):
            attended = None
            if mask is not None and not BIAS:
                col = start + tl.arange(0, BLOCK_N)[None, :]
                attended = load_bool_mask(mask + col.to(tl.int64) * mask_col, col < k_stop)
            p, dp, _ = _weights_of_keys(
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
            total += tl.sum(p * (dp - total[:, None]), 1) / tl.maximum(tl.sum(p, 1), 0.5)
    else:
        tl.store(delta + at, total, exists)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    for edge in tl.static_range(2 if padding is None else 3):
        low = first if edge == 0 else (bounded if edge == 1 else padded)
        high = bounded if edge == 0 else (padded if edge == 1 else stop)
        for visited in range(0, high - low, BLOCK_N):
            start = low + visited
            attended = None
            any_attended = True
            if mask is not None and not BIAS:
                col = start + tl.arange(0, BLOCK_N)[None, :]
                attended = load_bool_mask(mask + col.to(tl.int64) * mask_col, col < k_stop)
                any_attended = tl.max(attended.to(tl.int32)) > 0
            if any_attended:
                p, dp, key = _weights_of_keys(
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
                ds = p * (dp - total[:, None])
                acc = tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee")
                if PRECISE:
                    excess += tl.sum(ds, 1)
    if PRECISE:
        # In exact arithmetic the sum of ds over the keys is 0. Its computed value is the rounding
        # error of delta, and is added to what the other kernels read.
        tl.store(delta + at, total + excess, exists)
    store_rows(dq + (b * q_len * HEADS + h) * D, row, HEADS * D, exists, acc * scale, D, BLOCK_D)


@triton.jit
def _dkey_step(dk, dv, key, value, q, dout, stats, delta, mask, attended, inside, seed, at, start,
               col, q_count, offset, ROWS, q_row, dout_row, first_col, scale, threshold, factor,
               EDGE: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr):  # fmt: skip
    """Return dk and dv after one more block of queries.

    Tiles are transposed here, [keys, queries]: the weights then are in the registers that the
    matrix products of dk and dv read them from.
    """
    i = start + tl.arange(0, BLOCK_M)
    exists = i < q_count
    at += i
    query = load_rows(q, i, q_row, exists, D, BLOCK_D)
    m = tl.load(stats + at, exists, float("inf"))[None, :]
    x = logits(
        key,
        query,
        mask,
        attended,
        inside[:, None] if BIAS else None,
        col[:, None],
        (i + offset)[None, :] if EDGE else None,
        scale,
        BIAS,
    )
    p = exponential(x, m, scale, BIAS)
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
    return tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee"), dv


@kernel(
    do_not_specialize=["q_len", "k_len", "BLOCKS", "SEQUENCES", "ROWS", "threshold", "KEY_HEADS"]
)
def _dkey_kernel(q, k, v, dout, mask, padding, cu_q, cu_k, seed, stats, delta, dk, dv,
                 q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                 dout_batch, dout_head, dout_row, mask_batch, mask_head, mask_row, mask_col,
                 padding_batch, padding_col, q_len, k_len, KEY_HEADS, GROUP, BLOCKS, SEQUENCES,
                 ROWS, scale, threshold, factor,
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


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    out: Tensor,
    stats: Tensor,
    scale: float,
    causal: int,
    dropout_p: float,
    seed: Tensor | None,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dquery, dkey, dvalue and dattn_mask of ``llmos::attention_backward``."""
    batch, heads, q_len, d = q.shape
    kv_heads, k_len, v_dim = v.shape[1:]
    dq = q.new_empty((batch, q_len, heads, d))
    dk = q.new_empty((batch, k_len, kv_heads, d))
    dv = q.new_empty((batch, k_len, kv_heads, v_dim))
    dmask = q.new_empty(0)
    if mask_grad and attn_mask is not None:
        dmask = attn_mask.new_empty(attn_mask.shape)
    q, k, v, dout = (with_unit_columns(t) for t in (q, k, v, dout))
    stats = stats.contiguous()
    delta = stats.new_empty(stats.shape[1:])
    block_d, block_dv = block_dim(d), block_dim(v_dim)
    threshold, factor = dropout_arguments(dropout_p)
    shared = dict(
        q=q,
        k=k,
        v=v,
        dout=dout,
        seed=seed if dropout_p else None,
        stats=stats,
        delta=delta,
        q_len=q_len,
        k_len=k_len,
        GROUP=heads // kv_heads,
        ROWS=delta.numel(),
        scale=scale,
        threshold=threshold,
        factor=factor,
        CAUSAL=causal,
        D=d,
        DV=v_dim,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        **stride_arguments(q=q, k=k, v=v, dout=dout),
        **mask_arguments(attn_mask, padding),
    )
    varlen = varlen_arguments(cu_q, cu_k)
    variant = tile_variant(attn_mask, padding, shared["seed"], cu_q)
    if dq.numel():
        blocks = tile_arguments("dquery", q, v_dim, variant)
        count = thread_blocks_per_head(cu_q, q_len, blocks["BLOCK_M"])
        _dquery_kernel[(count * batch * heads,)](
            **shared,
            **varlen,
            out=out.contiguous(),
            dq=dq,
            HEADS=heads,
            BLOCKS=count,
            PRECISE=q.dtype == torch.float32 or k_len <= blocks["BLOCK_N"],
            **blocks,
        )
    if dk.numel():
        blocks = tile_arguments("dkey", q, v_dim, variant)
        count = thread_blocks_per_head(cu_k, k_len, blocks["BLOCK_N"])
        _dkey_kernel[(count * batch * kv_heads,)](
            **shared, **varlen, dk=dk, dv=dv, KEY_HEADS=kv_heads, BLOCKS=count, **blocks
        )
    if dmask.numel():
        launch_dmask(dmask, shared, batch, heads)
    return dq, dk, dv, dmask


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield the launchers and arguments whose kernels the pack holds."""
    for call in pack_shapes.attention(pack_shapes.PLAIN_AND_MASKED):
        yield backward, call.backward()
