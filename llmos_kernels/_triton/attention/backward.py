"""Launch the Triton backward kernels of attention; the formulas are in ``ops/attention.py``.

Three kernels recompute the attention weights p from the statistics: that of dquery (``dquery.py``),
which also stores delta for the others, that of dkey and dvalue (``dkey.py``), and that of the
gradient of a float mask (``backward_mask.py``). There are no atomics, and nothing of shape
[q_len, k_len] is stored but the gradient of the mask.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmos_kernels._triton.attention.backward_mask import launch_dmask
from llmos_kernels._triton.attention.dkey import dkey_kernel
from llmos_kernels._triton.attention.dquery import dquery_kernel
from llmos_kernels._triton.attention.scores import (
    mask_arguments,
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


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    stats: Tensor,
    scale: float,
    causal: int,
    dropout_p: float,
    softcap: float,
    seed: Tensor | None,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the results of ``llmos::attention_backward``."""
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
        softcap=softcap or None,
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
    variant = tile_variant(attn_mask, padding, shared["seed"], cu_q, softcap)
    if dq.numel():
        blocks = tile_arguments("dquery", q, v_dim, variant)
        count = thread_blocks_per_head(cu_q, q_len, blocks["BLOCK_M"])
        dquery_kernel[(count * batch * heads,)](
            **shared,
            **varlen,
            sinks=None if sinks is None else sinks.contiguous(),
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
        dkey_kernel[(count * batch * kv_heads,)](
            **shared, **varlen, dk=dk, dv=dv, KEY_HEADS=kv_heads, BLOCKS=count, **blocks
        )
    if dmask.numel():
        launch_dmask(dmask, shared, batch, heads)
    dsinks = q.new_empty(0)
    if sinks is not None:
        p = torch.exp(sinks.float()[:, None] - stats[0]) * stats[1]
        dsinks = -(p * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dmask, dsinks


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for call in pack_shapes.attention(pack_shapes.PLAIN_AND_MASKED):
        yield backward, call.backward()
