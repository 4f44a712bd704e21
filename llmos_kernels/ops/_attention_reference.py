"""The reference of attention: the forward, the weights and the gradients by their formulas.

The formulas are in ``ops/attention.py``. All of it is plain torch ops on any device and dtype.
"""

import math

import torch
from torch import Tensor

from llmos_kernels.ops._attention_arguments import (
    NOT_CAUSAL,
    TOP_LEFT,
    AttentionOptions,
    AttentionTensors,
)
from llmos_kernels.ops._dropout import keep_mask

__all__: list[str] = []


def attend(
    tensors: AttentionTensors, options: AttentionOptions, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [batch, q_len, heads, v_dim], stats [2, batch, heads, q_len] and the weights.

    The weights [batch, heads, q_len, k_len] are those after dropout.
    """
    query, key, value = _widened(
        tensors.query, tensors.key, tensors.value, tensors.key_padding_mask
    )
    logits = _masked(_scores(query, key, options), tensors, options)
    weights, _, stats = _softmax(logits, tensors.sinks)
    if seed is not None:
        factors = dropout_factors(weights, seed, options.dropout_p, tensors.cu_seqlens_k)
        weights = weights * factors
    return (weights @ value).transpose(1, 2), stats, weights


def _softmax(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | int, Tensor]:
    """Return the weights, 0 in rows where every logit is -inf, those of sinks, and (m, 1 / l).

    The weight of a sink is 0 without ``sinks``, else [batch, heads, q_len].
    """
    detached = logits.detach()
    m = detached.amax(-1) if logits.shape[-1] else detached.sum(-1).fill_(float("-inf"))
    sink = None if sinks is None else sinks.to(logits.dtype)[:, None]
    if sink is not None:
        m = torch.maximum(m, sink.detach())
    m = m.masked_fill(m == float("-inf"), 0)
    p = torch.exp(logits - m[..., None])
    p_sink = 0 if sink is None else torch.exp(sink - m)
    total = p.sum(-1) + p_sink
    nothing = total == 0
    inverse = total.masked_fill(nothing, 1).reciprocal().masked_fill(nothing, 0)
    return p * inverse[..., None], p_sink * inverse, torch.stack((m, inverse.detach()))


def _widened(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three in the accumulation dtype, with a key and value head for each query head."""
    if key_padding_mask is not None:  # Ignored keys and values may hold anything, also NaN.
        ignored = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(ignored, 0), value.masked_fill(ignored, 0)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    acc = torch.promote_types(query.dtype, torch.float32)
    # Torch's products then give the same bits for every layout.
    return query.to(acc).contiguous(), key.to(acc).contiguous(), value.to(acc).contiguous()


def _scores(query: Tensor, key: Tensor, options: AttentionOptions) -> Tensor:
    """Return the scaled and capped scores of ``query`` and ``key``, which are ``_widened``."""
    scores, softcap = query @ key.mT * options.scale, options.softcap
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def _masked(logits: Tensor, tensors: AttentionTensors, options: AttentionOptions) -> Tensor:
    """Return ``logits``, which are the ``_scores``, with all masks applied."""
    _, _, _, attn_mask, key_padding_mask, cu_q, cu_k, _ = tensors
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        else:
            logits = logits + attn_mask.to(logits.dtype)
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None], float("-inf"))
    q_len, k_len = logits.shape[2:]
    rows = torch.arange(q_len, device=logits.device)[:, None]
    cols = torch.arange(k_len, device=logits.device)[None]
    offset: int | Tensor = k_len - q_len
    if cu_q is not None and cu_k is not None:
        of_row, of_col = _sequence(cu_q, rows), _sequence(cu_k, cols)
        logits = logits.masked_fill(of_row != of_col, float("-inf"))
        offset = (cu_k.diff() - cu_q.diff())[of_row]
        rows, cols = rows - cu_q[of_row], cols - cu_k[of_col]
    if options.causal != NOT_CAUSAL:
        last = rows if options.causal == TOP_LEFT else rows + offset
        logits = logits.masked_fill(cols > last, float("-inf"))
    return logits


def _sequence(cu_seqlens: Tensor, at: Tensor) -> Tensor:
    """Return the index of the varlen sequence that each position belongs to."""
    return torch.searchsorted(cu_seqlens[1:-1].contiguous(), at.int().contiguous(), right=True)


def dropout_factors(weights: Tensor, seed: Tensor, p: float, cu_k: Tensor | None) -> Tensor:
    """Return 0 or 1 / (1 - p) for each of the ``weights`` [batch, heads, q_len, k_len]."""
    cols = weights.shape[-1]
    keep = keep_mask(seed, math.prod(weights.shape[:-1]), cols, p).view(weights.shape)
    if cu_k is not None:
        at = torch.arange(cols, device=weights.device)
        keep = keep[..., at - cu_k[_sequence(cu_k, at)]]
    return keep.to(weights.dtype) * (1 / (1 - p))


def forward_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: int,
    dropout_p: float,
    softcap: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return out [batch, q_len, heads, v_dim] in the dtype of ``query``, and stats.

    This is the reference of the op ``attention_forward``, with the arguments of its schema.
    """
    tensors = AttentionTensors(query, key, value, attn_mask, key_padding_mask, cu_q, cu_k, sinks)
    out, stats, _ = attend(tensors, AttentionOptions(scale, causal, dropout_p, softcap), seed)
    return out.to(query.dtype).contiguous(), stats


def weights_reference(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    stats: Tensor,
    scale: float,
    causal: int,
    dropout_p: float,
    softcap: float,
    seed: Tensor | None,
    mean: bool,
) -> Tensor:
    """Return the weights after dropout [batch, heads, q_len, k_len], or their mean over heads.

    This is the reference of the op ``attention_weights``, with the arguments of its schema.
    """
    tensors = AttentionTensors(query, key, key, attn_mask, key_padding_mask, None, None)
    options = AttentionOptions(scale, causal, dropout_p, softcap)
    wide_query, wide_key, _ = _widened(query, key, key, key_padding_mask)
    logits = _masked(_scores(wide_query, wide_key, options), tensors, options)
    weights = torch.exp(logits - stats[0, ..., None]) * stats[1, ..., None]
    if seed is not None:
        weights = weights * dropout_factors(weights, seed, dropout_p, None)
    return (weights.mean(1) if mean else weights).to(query.dtype)


def attention_gradients(
    dout: Tensor | None,
    dweights: Tensor | None,
    tensors: AttentionTensors,
    options: AttentionOptions,
    seed: Tensor | None,
    stats: Tensor | None = None,
) -> list[Tensor | None]:
    """Return the gradients of query, key, value, a float attn_mask and sinks, differentiable.

    Those of a mask and of sinks are None where there are none. ``dout`` is
    [batch, heads, q_len, v_dim], ``dweights`` [batch, heads, q_len, k_len]; one of them may be
    None. The weights are recomputed from ``stats`` where it is given.
    """
    q, k, v, attn_mask, key_padding_mask, _, cu_k, sinks = tensors
    query, key, value = _widened(q, k, v, key_padding_mask)
    scores = _scores(query, key, options)
    logits = _masked(scores, tensors, options)
    p_sink: Tensor | int = 0
    if stats is None:
        p, p_sink, _ = _softmax(logits, sinks)
    else:
        p = torch.exp(logits - stats[0, ..., None]) * stats[1, ..., None]
        if sinks is not None:
            p_sink = torch.exp(sinks.to(p.dtype)[:, None] - stats[0]) * stats[1]
    factors: Tensor | int = 1
    if seed is not None:
        factors = dropout_factors(p, seed, options.dropout_p, cu_k)
    dp = torch.zeros_like(p) if dweights is None else dweights.to(p.dtype).contiguous()
    dvalue = torch.zeros_like(value)
    if dout is not None:
        dout = dout.to(p.dtype).contiguous()
        dp = dp + dout @ value.mT
        dvalue = (p * factors).mT @ dout
    dp = dp * factors
    # A row of p and its sink sum to 1 but for the rounding of stats, or to 0 where nothing is seen.
    delta = (p * dp).sum(-1) / (p.sum(-1) + p_sink).clamp_min(0.5)
    ds = p * (dp - delta[..., None])
    dmask = None
    if attn_mask is not None and attn_mask.is_floating_point():
        dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    if options.softcap:
        ds = ds * (1 - (scores / options.softcap).square())

    def of_heads(gradient: Tensor, t: Tensor) -> Tensor:
        return gradient.unflatten(1, (t.shape[1], -1)).sum(2).to(t.dtype)

    scale = options.scale
    dquery, dkey = of_heads(ds @ key * scale, q), of_heads(ds.mT @ query * scale, k)
    dsinks = None if sinks is None else -(p_sink * delta).sum((0, 2)).to(sinks.dtype)
    return [dquery, dkey, of_heads(dvalue, v), dmask, dsinks]


def backward_reference(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
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
    """Return dquery, dkey and dvalue [batch, length, heads, dim], dattn_mask and dsinks.

    dattn_mask is empty unless ``mask_grad`` is set and the mask is float, dsinks without sinks.
    This is the reference of the op ``attention_backward``, with the arguments of its schema.
    """
    tensors = AttentionTensors(query, key, value, attn_mask, key_padding_mask, cu_q, cu_k, sinks)
    options = AttentionOptions(scale, causal, dropout_p, softcap)
    *of_heads, dmask, dsinks = attention_gradients(dout, None, tensors, options, seed, stats)
    dquery, dkey, dvalue = (d.transpose(1, 2).contiguous() for d in of_heads if d is not None)
    dmask = dmask.contiguous() if mask_grad and dmask is not None else query.new_empty(0)
    dsinks = query.new_empty(0) if dsinks is None else dsinks
    return dquery, dkey, dvalue, dmask, dsinks
