"""Triton kernel of the attention weights; the formulas are in ``ops/attention.py``.

A thread block recomputes one tile of the weights of a head, or of their mean over heads, from the
statistics of the forward pass.

Memory traffic: the weights are written once, query and key are read once for each tile.
"""

from collections.abc import Callable, Iterator

import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.attention.scores import (
    TOP_LEFT,
    exponential,
    load_bool_mask,
    load_rows,
    logits,
    mask_arguments,
    readable_keys,
    scores,
    stride_arguments,
    with_unit_columns,
)
from llmos_kernels._triton.attention.tiles import block_dim, tile_arguments
from llmos_kernels._triton.rows import dropout_arguments, dropout_factors
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel


@kernel(do_not_specialize=["q_len", "k_len", "ROWS", "threshold", "HEADS", "OUT_HEADS"])
def _weights_kernel(q, k, mask, padding, seed, stats, weights, q_batch, q_head, q_row, k_batch,
                    k_head, k_row, mask_batch, mask_head, mask_row, mask_col, padding_batch,
                    padding_col, q_len, k_len, HEADS, GROUP, OUT_HEADS, ROWS, scale, softcap,
                    threshold, factor, CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    """Store a tile of the weights of one head or, if OUT_HEADS is 1, of their mean over heads."""
    k_blocks = tl.cdiv(k_len, BLOCK_N)
    q_blocks = tl.cdiv(q_len, BLOCK_M)
    tile = tl.program_id(0)
    out_bh = (tile // k_blocks // q_blocks).to(tl.int64)
    b = out_bh // OUT_HEADS
    first_col = tile % k_blocks * BLOCK_N
    col = first_col + tl.arange(0, BLOCK_N)
    i = tile // k_blocks % q_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = i < q_len
    if padding is not None:
        padding += b * padding_batch
    inside = readable_keys(padding, padding_col, col, k_len)
    last = i + (0 if CAUSAL == TOP_LEFT else k_len - q_len)
    heads = HEADS // OUT_HEADS
    count = heads
    if CAUSAL:
        count = tl.where(first_col <= tl.max(last), heads, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(0, count):
        h = out_bh % OUT_HEADS + n
        query = load_rows(q + b * q_batch + h * q_head, i, q_row, exists, D, BLOCK_D)
        key = load_rows(k + b * k_batch + h // GROUP * k_head, col, k_row, inside, D, BLOCK_D)
        mask_at = mask
        if mask is not None:
            mask_at += b * mask_batch + h * mask_head + col.to(tl.int64)[None, :] * mask_col
            if mask_row is not None:
                mask_at += tl.minimum(i, q_len - 1).to(tl.int64)[:, None] * mask_row
        attended = None
        if mask is not None and not BIAS:
            attended = load_bool_mask(mask_at, inside[None, :])
        x = logits(
            scores(query, key, scale, softcap),
            mask_at,
            attended,
            inside[None, :],
            col[None, :],
            last[:, None] if CAUSAL else None,
            scale,
            softcap,
            BIAS,
        )
        at = (b * HEADS + h) * q_len + i
        m = tl.load(stats + at, exists, float("inf"))[:, None]
        p = exponential(x, m, scale, BIAS or softcap is not None)
        p *= tl.load(stats + ROWS.to(tl.int64) + at, exists, 0.0)[:, None]
        if seed is not None:
            p *= dropout_factors(seed, at[:, None], first_col, threshold, factor, BLOCK_M, BLOCK_N)
        acc += p
    acc /= heads
    to = weights + (out_bh * q_len + i)[:, None] * k_len + col[None, :]
    tl.store(to, acc.to(weights.dtype.element_ty), exists[:, None] & (col < k_len)[None, :])


def weights(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    stats: Tensor,
    scale: float,
    causal: int,
    dropout_p: float,
    softcap: float,
    seed: Tensor | None,
    mean: bool,
) -> Tensor:
    """Return the result of ``llmos::attention_weights``: of each head, or the mean over heads."""
    batch, heads, q_len, d = q.shape
    k_len = k.shape[2]
    w = q.new_empty((batch, *(() if mean else (heads,)), q_len, k_len))
    if w.numel() == 0:
        return w
    q, k = with_unit_columns(q), with_unit_columns(k)
    out_heads = 1 if mean else heads
    blocks = tile_arguments("weights", q, d, " dropout" if dropout_p else "")
    tiles = triton.cdiv(q_len, blocks["BLOCK_M"]) * triton.cdiv(k_len, blocks["BLOCK_N"])
    threshold, factor = dropout_arguments(dropout_p)
    _weights_kernel[(tiles * batch * out_heads,)](
        q=q,
        k=k,
        seed=seed if dropout_p else None,
        stats=stats.contiguous(),
        weights=w,
        q_len=q_len,
        k_len=k_len,
        HEADS=heads,
        GROUP=heads // k.shape[1],
        OUT_HEADS=out_heads,
        ROWS=batch * heads * q_len,
        scale=scale,
        softcap=softcap or None,
        threshold=threshold,
        factor=factor,
        CAUSAL=causal,
        D=d,
        BLOCK_D=block_dim(d),
        **stride_arguments(q=q, k=k),
        **mask_arguments(attn_mask, padding),
        **blocks,
    )
    return w


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for call in pack_shapes.attention(pack_shapes.PADDED):
        for mean in (True, False):
            yield weights, call.weights(mean)
