"""Triton forward kernel of attention; the formulas are in ``ops/attention.py``.

A thread block holds a block of queries of one head and loops over the keys that they may see
(``attend.py``). For few queries and many keys ``decode.py`` splits the keys.

Memory traffic: query is read and out written once, key and value are read once for each block of
queries.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.attention.attend import add_sink, attend
from llmos_kernels._triton.attention.decode import (
    MAX_SPLIT_QUERIES,
    MIN_SPLIT_KEYS,
    forward_in_parts,
)
from llmos_kernels._triton.attention.scores import (
    load_rows,
    mask_arguments,
    query_block,
    store_rows,
    stride_arguments,
    varlen_arguments,
    with_unit_columns,
)
from llmos_kernels._triton.attention.tiles import (
    block_dim,
    thread_blocks_per_head,
    tile_arguments,
    tile_variant,
)
from llmos_kernels._triton.rows import dropout_arguments
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel


@kernel(
    do_not_specialize=["q_len", "k_len", "BLOCKS", "SEQUENCES", "BATCH_HEADS", "threshold", "HEADS"]
)
def _forward_kernel(q, k, v, mask, padding, cu_q, cu_k, sinks, seed, out, stats, q_batch, q_head,
                    q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head,
                    mask_row, mask_col, padding_batch, padding_col, q_len, k_len, HEADS, GROUP,
                    BLOCKS, SEQUENCES, BATCH_HEADS, scale, softcap, threshold, factor,
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
        0 * k_count,  # The first key, as a value of the type of k_count.
        tl.where(first_row < q_count, k_count, 0),  # No key for blocks past the last query.
        first_row + offset,
        tl.minimum(first_row + BLOCK_M, q_count) - 1 + offset,
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
    if sinks is not None:
        m, total, rescale = add_sink(m, total, tl.load(sinks + h).to(tl.float32))
        acc *= rescale[:, None]
    inverse = tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))
    tl.store(stats + at, m, i < q_count)
    tl.store(stats + BATCH_HEADS.to(tl.int64) * q_len + at, inverse, i < q_count)
    out += (b * q_len * HEADS + h) * DV
    store_rows(out, row, HEADS * DV, i < q_count, acc * inverse[:, None], DV, BLOCK_DV)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: int,
    dropout_p: float,
    softcap: float,
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
        softcap=softcap or None,
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
    sinks = None if sinks is None else sinks.contiguous()
    if cu_q is None and heads // kv_heads * q_len <= MAX_SPLIT_QUERIES and k_len > MIN_SPLIT_KEYS:
        forward_in_parts(out, stats, sinks, shared)
        return out, stats
    variant = tile_variant(attn_mask, padding, shared["seed"], cu_q, softcap)
    blocks = tile_arguments("forward", q, dv, variant)
    if (rows := max(triton.next_power_of_2(q_len), 16)) < blocks["BLOCK_M"]:
        blocks["BLOCK_M"] = rows
        # A warp multiplies 16 rows. The limit of registers was chosen for the larger tile.
        if q.dtype != torch.float32:
            blocks |= {"num_warps": min(blocks["num_warps"], max(rows // 16, 4)), "maxnreg": None}
    count = thread_blocks_per_head(cu_q, q_len, blocks["BLOCK_M"])
    _forward_kernel[(count * batch * heads,)](
        **shared,
        **varlen_arguments(cu_q, cu_k),
        sinks=sinks,
        out=out,
        stats=stats,
        HEADS=heads,
        BLOCKS=count,
        BATCH_HEADS=batch * heads,
        **blocks,
    )
    return out, stats


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for call in pack_shapes.attention(pack_shapes.PLAIN_AND_MASKED):
        yield forward, call.forward()
    for call in pack_shapes.attention(pack_shapes.SHORT, lengths=(64, 60, 32, 28)):
        yield forward, call.forward()
    for call in pack_shapes.attention(pack_shapes.DECODED, queries=1):
        yield forward, call.forward()
