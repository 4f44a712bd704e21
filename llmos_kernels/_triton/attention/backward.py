"""Triton backward kernels of attention; formulas in ``ops/attention.py``.

Each recomputes the weights from the statistics: dquery (which also writes delta = sum(dout * out)
for the others) by blocks of queries, dkey and dvalue by blocks of keys, over all query heads that
share them, and the gradient of a float mask by tiles of its own shape, over all that it was
broadcast to. No atomics, and nothing of [q_len, k_len] is stored but that gradient.
"""

import torch
import triton
import triton.language as tl

from llmos_kernels._triton.attention.backward_mask import launch_dmask
from llmos_kernels._triton.attention.scores import (
    TOP_LEFT,
    attends,
    block_dim,
    exponential,
    key_span,
    keys_inside,
    load_of,
    load_rows,
    locate,
    logits,
    mask_arguments,
    packed_arguments,
    query_block,
    readable_keys,
    sequence_span,
    slots,
    store_rows,
    stride_arguments,
    tile,
    tile_weights,
    with_unit_columns,
)
from llmos_kernels._triton.rows import dropout_arguments, dropout_factors
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel


@triton.jit
def _weights_of_keys(query, dout, m, inverse, k, v, mask, attended, padding, padding_col, seed, drawn,
                     start, last, k_first, k_stop, k_row, v_row, mask_col, scale, threshold, factor,
                     EDGE: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr,
                     DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """``tile_weights`` of the keys from ``start`` on, and these keys."""
    col = start + tl.arange(0, BLOCK_N)
    inside = keys_inside(padding, padding_col, col, k_first, k_stop, EDGE)
    key = load_rows(k, col, k_row, inside, D, BLOCK_D)
    value = load_rows(v, col, v_row, inside, DV, BLOCK_DV)
    p, dp = tile_weights(query, key, value, dout, m, inverse,
                          mask + col.to(tl.int64)[None, :] * mask_col if BIAS else None, attended,
                          inside[None, :] if EDGE else None, col[None, :],
                          last if EDGE and CAUSAL else None, seed, drawn, start, scale, threshold, factor,
                          BIAS, BLOCK_M, BLOCK_N)  # fmt: skip
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
    b, h, first_row, q_start, q_count, k_start, k_count, offset = query_block(
        cu_q, cu_k, q_len, k_len, HEADS, BLOCKS, SEQUENCES, CAUSAL, BLOCK_M
    )
    i = first_row + tl.arange(0, BLOCK_M)
    row = q_start + i
    real = i < q_count
    k += b * k_batch + h // GROUP * k_head + k_start.to(tl.int64) * k_row
    v += b * v_batch + h // GROUP * v_head + k_start.to(tl.int64) * v_row
    if mask is not None:
        mask += b * mask_batch + h * mask_head
        if mask_row is not None:
            mask += tl.minimum(i, q_count - 1).to(tl.int64)[:, None] * mask_row
    if padding is not None:
        padding += b * padding_batch
    at = (b * HEADS + h) * q_len + row
    m = tl.load(stats + at, real, float("inf"))[:, None]
    inverse = tl.load(stats + ROWS.to(tl.int64) + at, real, 0.0)[:, None]
    query = load_rows(q + b * q_batch + h * q_head, row, q_row, real, D, BLOCK_D)
    d_out = load_rows(dout + b * dout_batch + h * dout_head, row, dout_row, real, DV, BLOCK_DV)
    o = load_rows(out + (b * q_len * HEADS + h) * DV, row, HEADS * DV, real, DV, BLOCK_DV)
    # By the very product that dp takes: a lone key's value is out, and its gradient exactly 0.
    diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
    total = tl.dot(d_out, tl.trans(o), input_precision="ieee")
    total = tl.sum(tl.where(diagonal, total, 0.0), 1)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    k_first, k_stop, first, whole, holes, stop = key_span(
        padding, padding_col, 0 * k_count, tl.where(first_row < q_count, k_count, 0),
        first_row + offset, tl.minimum(first_row + BLOCK_M, q_count) - 1 + offset, CAUSAL, BLOCK_N,
    )  # fmt: skip
    last = (i + offset)[:, None]
    if PRECISE:
        # What is rounded in dout * out, and not in dp, weighs most where there are few keys. There
        # delta is the mean of dp by the weights themselves, whose sum is 1, or 0 where nothing is
        # seen.
        for start in range(first, tl.where(stop - first <= BLOCK_N, stop, first), BLOCK_N):
            attended = None
            if mask is not None and not BIAS:
                col = start + tl.arange(0, BLOCK_N)[None, :]
                attended = attends(mask + col.to(tl.int64) * mask_col, col < k_stop)
            p, dp, _ = _weights_of_keys(
                query, d_out, m, inverse, k, v, mask, attended, padding, padding_col, seed,
                at[:, None], start, last, k_first, k_stop, k_row, v_row, mask_col, scale, threshold,
                factor, 1 if padding is None else 2, CAUSAL, BIAS, D, DV, BLOCK_M, BLOCK_N, BLOCK_D,
                BLOCK_DV,
            )  # fmt: skip
            total += tl.sum(p * (dp - total[:, None]), 1) / tl.maximum(tl.sum(p, 1), 0.5)
    else:
        tl.store(delta + at, total, real)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    for edge in tl.static_range(2 if padding is None else 3):
        low = first if edge == 0 else (whole if edge == 1 else holes)
        high = whole if edge == 0 else (holes if edge == 1 else stop)
        for walked in range(0, high - low, BLOCK_N):
            start = low + walked
            attended = None
            any_attended = True
            if mask is not None and not BIAS:
                col = start + tl.arange(0, BLOCK_N)[None, :]
                attended = attends(mask + col.to(tl.int64) * mask_col, col < k_stop)
                any_attended = tl.max(attended.to(tl.int32)) > 0
            if any_attended:
                p, dp, key = _weights_of_keys(
                    query, d_out, m, inverse, k, v, mask, attended, padding, padding_col, seed,
                    at[:, None], start, last, k_first, k_stop, k_row, v_row, mask_col, scale,
                    threshold, factor, edge, CAUSAL, BIAS, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
                ds = p * (dp - total[:, None])
                acc = tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee")
                if PRECISE:
                    excess += tl.sum(ds, 1)
    if PRECISE:
        # The sum of ds is 0 but for rounding: the other kernels take delta without what is left.
        tl.store(delta + at, total + excess, real)
    store_rows(dq + (b * q_len * HEADS + h) * D, row, HEADS * D, real, acc * scale, D, BLOCK_D)


@triton.jit
def _dkey_step(dk, dv, key, value, q, dout, stats, delta, mask, attended, inside, seed, at, start,
               col, q_count, offset, ROWS, q_row, dout_row, first_col, scale, threshold, factor,
               EDGE: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of queries into dk and dv. Tiles are [keys, queries]: their weights then are in
    registers where the products want them."""
    i = start + tl.arange(0, BLOCK_M)
    real = i < q_count
    at += i
    query = load_rows(q, i, q_row, real, D, BLOCK_D)
    m = tl.load(stats + at, real, float("inf"))[None, :]
    x = logits(key, query, mask, attended, inside[:, None] if BIAS else None, col[:, None],
               (i + offset)[None, :] if EDGE else None, scale, BIAS)  # fmt: skip
    p = exponential(x, m, scale, BIAS)
    p *= tl.load(stats + ROWS.to(tl.int64) + at, real, 0.0)[None, :]
    d_out = load_rows(dout, i, dout_row, real, DV, BLOCK_DV)
    dp = tl.dot(value, tl.trans(d_out), input_precision="ieee")
    dropped = p
    if seed is not None:
        factors = tl.trans(
            dropout_factors(seed, at[:, None], first_col, threshold, factor, BLOCK_M, BLOCK_N)
        )
        dropped *= factors
        dp *= factors
    dv = tl.dot(dropped.to(d_out.dtype), d_out, dv, input_precision="ieee")
    ds = p * (dp - tl.load(delta + at, real, 0.0)[None, :])
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
    bh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    b = bh // KEY_HEADS
    hk = bh % KEY_HEADS
    sequence, block = locate(cu_k, SEQUENCES, k_len, tl.program_id(0) % BLOCKS, BLOCK_N)
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
    # Queries before ``first`` see none of these keys, those from ``whole`` on see all.
    first = 0 * q_count
    whole = first
    stop = tl.where(tl.max(inside.to(tl.int32)) > 0, q_count, 0)
    if CAUSAL:
        first = tl.maximum(first_col - offset, 0) // BLOCK_M * BLOCK_M
        whole = tl.maximum(first_col + BLOCK_N - 1 - offset, 0)
        whole = (whole + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        whole = tl.maximum(tl.minimum(whole, stop), first)
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
            low = whole if seen else first
            for walked in range(0, (stop if seen else whole) - low, BLOCK_M):
                start = low + walked
                tile = mask_h
                if mask_row is not None:
                    i = tl.minimum(start + tl.arange(0, BLOCK_M), q_count - 1)
                    tile += i.to(tl.int64)[None, :] * mask_row
                if mask is not None and not BIAS:
                    attended = attends(tile, inside[:, None])
                    if tl.max(attended.to(tl.int32)) > 0:
                        dkey, dvalue = _dkey_step(
                            dkey, dvalue, key, value, q_h, dout_h, stats, delta, None, attended,
                            inside, seed, at, start, col, q_count, offset, ROWS, q_row, dout_row,
                            first_col, scale, threshold, factor, 1 - seen, BIAS, D, DV,
                            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                        )  # fmt: skip
                else:
                    dkey, dvalue = _dkey_step(
                        dkey, dvalue, key, value, q_h, dout_h, stats, delta, tile, None,
                        inside, seed, at, start, col, q_count, offset, ROWS, q_row, dout_row,
                        first_col, scale, threshold, factor, 1 - seen, BIAS, D, DV,
                        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                    )  # fmt: skip
    dkey = tl.where(inside[:, None], dkey * scale, 0.0)
    dvalue = tl.where(inside[:, None], dvalue, 0.0)
    exists = col < k_count
    row = k_start + col
    store_rows(dk + (b * k_len * KEY_HEADS + hk) * D, row, KEY_HEADS * D, exists, dkey, D, BLOCK_D)
    store_rows(dv + (b * k_len * KEY_HEADS + hk) * DV, row, KEY_HEADS * DV, exists, dvalue, DV,
               BLOCK_DV)  # fmt: skip


def backward(
    dout, q, k, v, attn_mask, padding, cu_q, cu_k, out, stats, scale, causal, dropout_p, seed,
    mask_grad,
):  # fmt: skip
    batch, heads, q_len, d = q.shape
    kv_heads, k_len, dv = v.shape[1:]
    dq = q.new_empty((batch, q_len, heads, d))
    dk = q.new_empty((batch, k_len, kv_heads, d))
    d_v = q.new_empty((batch, k_len, kv_heads, dv))
    dmask = q.new_empty(0) if not mask_grad else attn_mask.new_empty(attn_mask.shape)
    q, k, v, dout = (with_unit_columns(t) for t in (q, k, v, dout))
    stats = stats.contiguous()
    delta = stats.new_empty(stats.shape[1:])
    block_d, block_dv = block_dim(d), block_dim(dv)
    threshold, factor = dropout_arguments(dropout_p)
    shared = dict(
        q=q, k=k, v=v, dout=dout, seed=seed if dropout_p else None, stats=stats, delta=delta,
        q_len=q_len, k_len=k_len, GROUP=heads // kv_heads, ROWS=delta.numel(), scale=scale,
        threshold=threshold, factor=factor, CAUSAL=causal, D=d, DV=dv, BLOCK_D=block_d,
        BLOCK_DV=block_dv, **stride_arguments(q=q, k=k, v=v, dout=dout),
        **mask_arguments(attn_mask, padding),
    )  # fmt: skip
    packed = packed_arguments(cu_q, cu_k)
    load = load_of(attn_mask, padding, shared["seed"], cu_q)
    if dq.numel():
        blocks = tile("dquery", q, dv, load)
        programs = slots(cu_q, q_len, blocks["BLOCK_M"])
        _dquery_kernel[(programs * batch * heads,)](
            **shared, **packed, out=out.contiguous(), dq=dq, HEADS=heads, BLOCKS=programs,
            PRECISE=q.dtype == torch.float32 or k_len <= blocks["BLOCK_N"], **blocks,
        )  # fmt: skip
    if dk.numel():
        blocks = tile("dkey", q, dv, load)
        programs = slots(cu_k, k_len, blocks["BLOCK_N"])
        _dkey_kernel[(programs * batch * kv_heads,)](
            **shared, **packed, dk=dk, dv=d_v, KEY_HEADS=kv_heads, BLOCKS=programs, **blocks
        )
    if dmask.numel():
        launch_dmask(dmask, shared, batch, heads)
    return dq, dk, d_v, dmask


def variants():
    """See ``examples``."""
    for call in pack_shapes.attention(pack_shapes.PLAIN_AND_MASKED):
        yield backward, call.backward()
