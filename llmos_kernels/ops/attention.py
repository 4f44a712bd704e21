"""Scaled dot-product attention with masks, bias gradients, dropout and weights in fused kernels.

    scores  = query key^T * scale,   with softcap   softcap * tanh(scores / softcap)
    logits  = scores + attn_mask,   -inf where a key is not visible to a query
    weights = exp(logits - m) / l,   m = max(logits),   l = sum(exp(logits - m))
    out     = dropout(weights) value

A key is visible to a query unless a bool ``attn_mask`` is False there, ``key_padding_mask`` is
True, ``is_causal`` puts it later, or it belongs to another of the varlen sequences (sequences of
different lengths, one after the other). A row without a visible key has weights, output and
gradients 0. ``m`` and ``l`` are float32 whatever the dtype.
With ``sinks`` a row has one more logit, that of its head, which counts in ``m`` and ``l`` and has
no value: the weights then sum to less than 1.
Vaswani et al. 2017, arXiv:1706.03762; tiled as in Dao 2023, arXiv:2307.08691; capped as in Gemma 2,
arXiv:2408.00118; sinks as in gpt-oss, arXiv:2508.10925.

The gradients, with p = weights, f = the dropout factors (0 or 1 / (1 - dropout_p)):

    dvalue = (f p)^T dout,   dp = f (dout value^T),   ds = p (dp - sum(p * dp))
    dquery = ds key * scale,   dkey = ds^T query * scale,   dattn_mask = ds summed to its shape
    dsinks = -p_sink sum(p * dp) summed over rows,   p_sink = exp(sink - m) / l

With ``softcap`` the ds of dquery and dkey is multiplied by 1 - (scores / softcap)^2.
Kernels recompute p from the saved statistics ``stats``, m and 1 / l. For rows with many keys they
take sum(dout * out), which is equal, for sum(p * dp).

The mask of dropout is that of ``ops/_dropout.py``: row (b * heads + h) * q_len + i, column j, where
j counts from the start of its own sequence.
"""

from typing import Any

import torch
from torch import Tensor

from llmos_kernels._core.registry import define, needs_grad, use_reference
from llmos_kernels.ops._attention_arguments import (
    AttentionOptions,
    AttentionTensors,
    check_attention,
)
from llmos_kernels.ops._attention_reference import (
    attend,
    attention_gradients,
    backward_reference,
    forward_reference,
    weights_reference,
)
from llmos_kernels.ops._dropout import draw_seed

__all__ = ["scaled_dot_product_attention", "scaled_dot_product_attention_reference"]


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, _d = query.shape
    acc = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty((batch, q_len, heads, value.shape[-1]))
    return out, query.new_empty((2, batch, heads, q_len), dtype=acc)


def _weights_fake(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    batch, heads, q_len, _ = query.shape
    mean = rest[-1]
    return query.new_empty((batch, *(() if mean else (heads,)), q_len, key.shape[2]))


def _backward_fake(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dquery, dkey, dvalue = (
        query.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3]))
        for t in (query, key, value)
    )
    mask_grad = rest[-1]
    dmask = query.new_empty(0)
    if mask_grad and attn_mask is not None:
        dmask = query.new_empty(attn_mask.shape, dtype=attn_mask.dtype)
    dsinks = query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return dquery, dkey, dvalue, dmask, dsinks


def _pairs(query: Tensor, key: Tensor, *rest: Tensor | None) -> int:
    """Return how many pairs of a query and a key there are, of all heads; masks do not count."""
    batch, heads, q_len, _ = query.shape
    cu_q, cu_k = rest[2:] if len(rest) == 4 else (None, None)
    if cu_q is None or cu_k is None:
        return batch * heads * q_len * key.shape[2]
    if cu_q.is_meta:  # Lengths are unknown there: taken for equal.
        return heads * q_len * key.shape[2] // (len(cu_q) - 1)
    return heads * int((cu_q.diff().long() * cu_k.diff().long()).sum())


def _forward_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    return 2 * _pairs(query, key, *rest[:4]) * (query.shape[3] + value.shape[3])


def _weights_flops(query: Tensor, key: Tensor, *_: Any) -> int:
    return 2 * _pairs(query, key) * query.shape[3]


def _backward_flops(dout: Tensor, *args: Any) -> int:
    """Return the FLOPs of dvalue, the gradient of the weights, dquery and dkey."""
    return 2 * _forward_flops(*args)


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_padding_mask,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sinks"
)

_OPTIONS = "float scale, int causal, float dropout_p, float softcap, Tensor? seed"

_forward = define(
    f"attention_forward({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor stats)",
    reference=forward_reference,
    fake=_forward_fake,
    triton="attention.forward:forward",
    flops=_forward_flops,
)

_weights = define(
    "attention_weights(Tensor query, Tensor key, Tensor? attn_mask, Tensor? key_padding_mask,"
    f" Tensor stats, {_OPTIONS}, bool mean) -> Tensor",
    reference=weights_reference,
    fake=_weights_fake,
    triton="attention.weights:weights",
    flops=_weights_flops,
)

_backward = define(
    f"attention_backward(Tensor dout, {_TENSORS}, Tensor out, Tensor stats, {_OPTIONS},"
    " bool mask_grad)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dattn_mask, Tensor dsinks)",
    reference=backward_reference,
    fake=_backward_fake,
    triton="attention.backward:backward",
    flops=_backward_flops,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        return_weights: str | None,
    ) -> tuple[Tensor | None, ...]:
        tensors = AttentionTensors(
            query, key, value, attn_mask, key_padding_mask, cu_q, cu_k, sinks
        )
        options = AttentionOptions(scale, causal, dropout_p, softcap)
        out, stats, weights = _fused(tensors, options, seed, return_weights)
        ctx.save_for_backward(*tensors, out, stats, seed)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.return_weights = options, return_weights
        return (out,) if return_weights is None else (out, weights)

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dweights: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        *saved, out, stats, seed = ctx.saved_tensors
        tensors = AttentionTensors(*saved)
        wanted = ctx.needs_input_grad
        if dout is None and dweights is None:
            return (None,) * len(wanted)
        if dout is None or dweights is not None or torch.is_grad_enabled():
            # There is no kernel for the gradient of the weights, nor for second derivatives.
            if ctx.return_weights == "mean" and dweights is not None:
                heads = tensors.query.shape[1]
                dweights = (dweights / heads).unsqueeze(1).expand(-1, heads, -1, -1)
            dout = None if dout is None else dout.transpose(1, 2)
            *gradients, dsinks = attention_gradients(dout, dweights, tensors, ctx.options, seed)
        else:
            *of_heads, dmask, dsinks = _backward(
                dout.transpose(1, 2), *tensors, out, stats, *ctx.options, seed, wanted[3]
            )
            gradients = [*(d.transpose(1, 2) for d in of_heads), dmask]
        # After the tensors come four options, the seed and return_weights.
        found = *gradients, None, None, None, dsinks, *(None,) * 6
        return tuple(g if w else None for g, w in zip(found, wanted, strict=True))


def _fused(
    tensors: AttentionTensors,
    options: AttentionOptions,
    seed: Tensor | None,
    return_weights: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return out, stats and, where they are wanted, the weights, by the ops."""
    out, stats = _forward(*tensors, *options, seed)
    if return_weights is None:
        return out, stats, None
    query, key, _, attn_mask, padding, *_ = tensors
    mean = return_weights == "mean"
    return out, stats, _weights(query, key, attn_mask, padding, stats, *options, seed, mean)


def _by_reference(
    tensors: AttentionTensors,
    options: AttentionOptions,
    seed: Tensor | None,
    return_weights: str | None,
) -> tuple[Tensor, Tensor]:
    """Return out and the weights by the reference, in the dtype of the query."""
    out, _, weights = attend(tensors, options, seed)
    weights = weights.mean(1) if return_weights == "mean" else weights
    dtype = tensors.query.dtype
    return out.to(dtype), weights.to(dtype)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    bottom_right: bool = False,
    return_weights: str | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention as ``torch.nn.functional.scaled_dot_product_attention`` does, masks fused.

    Unlike torch's, all masks may be combined, and a query that sees no key gets 0.

    Args:
        query: [batch, heads, q_len, head_dim]; or [..., q_len, head_dim] with other leading
            dimensions, or none; or [total_q, heads, head_dim] with ``cu_seqlens_q``. float32,
            bfloat16 or float16 (float64: the reference computes it), any strides, head_dim from 1
            to 256. The leading dimensions of query, key and value broadcast.
        key: [batch, heads, k_len, head_dim], of the dtype of ``query``.
        value: [batch, heads, k_len, v_dim], of the dtype of ``query``, v_dim from 1 to 256.
        attn_mask: Broadcasts to [batch, heads, q_len, k_len]. bool, True where a key is seen; or
            floating point, which is added to the logits and gets a gradient.
        dropout_p: The probability, in [0, 1), that a weight is set to 0. Applied whenever it is not
            0, as in torch.
        is_causal: Whether query i sees keys up to i alone.
        scale: The factor of the logits; None is 1 / sqrt(head_dim).
        enable_gqa: Whether groups of query heads may share a key and value head.
        key_padding_mask: [batch, k_len], bool, True where a key is IGNORED. It and
            ``return_weights`` take tensors of four dimensions, or of three without heads.
        cu_seqlens_q: [sequences + 1], int32, from 0 to total_q: where the varlen sequences begin.
        cu_seqlens_k: The same for ``key`` and ``value`` [total_k, heads, head_dim].
        bottom_right: Whether ``is_causal`` lets query i see keys up to i + k_len - q_len.
        return_weights: None, "per_head" or "mean".
        softcap: Bounds the scaled scores by softcap * tanh(scores / softcap), before any mask, as
            in Gemma 2; None for no bound.
        sinks: [heads], a logit of every query of a head that competes with the keys and has no
            value, as in gpt-oss. Of any floating dtype; gets a gradient. It is not
            dropped, no mask hides it, and it is not among the weights, which then sum to less
            than 1.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        The attention, like ``query`` but with v_dim for head_dim. With ``return_weights`` also the
        weights after dropout, as in ``nn.MultiheadAttention``: [batch, heads, q_len, k_len] for
        "per_head", their mean over heads [batch, q_len, k_len] for "mean". Under autocast the
        arguments are cast to its dtype first, as torch does.

    Raises:
        ValueError: Shapes, devices or options disagree, or a name is unknown.
        TypeError: A dtype is not as above. Both are RuntimeErrors too where torch raises those.

    Example:
        >>> query, key, value = (torch.randn(2, 8, 128, 64) for _ in range(3))
        >>> padding = torch.arange(128) >= torch.tensor([[128], [90]])
        >>> out = scaled_dot_product_attention(query, key, value, key_padding_mask=padding)
        >>> out.shape
        torch.Size([2, 8, 128, 64])

    Vaswani et al. 2017, arXiv:1706.03762.
    """
    call = check_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        key_padding_mask,
        cu_seqlens_q,
        cu_seqlens_k,
        bottom_right,
        return_weights,
        softcap,
        sinks,
    )
    seed = draw_seed(query.device) if dropout_p else None
    if use_reference(backend, call.tensors.query.dtype):
        return call.shaped(*_by_reference(call.tensors, call.options, seed, return_weights))
    if needs_grad(*call.tensors[:4], call.tensors.sinks):
        if torch.compiler.is_compiling():  # torch.compile refuses the same tensor twice.
            call = call.with_views()
        return call.shaped(*_Attention.apply(*call.tensors, *call.options, seed, return_weights))
    out, _, weights = _fused(call.tensors, call.options, seed, return_weights)
    return call.shaped(out, weights)


def scaled_dot_product_attention_reference(
    *args: Any, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``scaled_dot_product_attention`` by its definition.

    It consists of plain, differentiable torch ops. It runs on any device, and in float64 its result
    is exact.

    Args:
        *args: as ``scaled_dot_product_attention``, without ``backend``.
        **options: as ``scaled_dot_product_attention``, without ``backend``.

    Returns:
        The attention, like ``query`` but with v_dim for head_dim; with ``return_weights`` also the
        weights after dropout.
    """
    return scaled_dot_product_attention(*args, **options, backend="reference")
