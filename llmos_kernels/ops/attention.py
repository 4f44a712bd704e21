"""Scaled dot-product attention that keeps masks, bias gradients, dropout and weights fused.

    logits  = query key^T * scale + attn_mask,   -inf where a key is not visible to a query
    weights = exp(logits - m) / l,   m = max(logits),   l = sum(exp(logits - m))
    out     = dropout(weights) value

A key is visible to a query unless a bool ``attn_mask`` is False there, ``key_padding_mask`` is True,
``is_causal`` puts it later, or it belongs to another packed sequence. A row without a visible key
has weights, output and gradients 0. ``m`` and ``l`` are float32 whatever the dtype.
Vaswani et al. 2017, arXiv:1706.03762; tiled as in Dao 2023, arXiv:2307.08691.

Backward, with p = weights, f = the dropout factors (0 or 1 / (1 - dropout_p)):

    dvalue = (f p)^T dout,   dp = f (dout value^T),   ds = p (dp - sum(p * dp))
    dquery = ds key * scale,   dkey = ds^T query * scale,   dattn_mask = ds summed to its shape

Kernels take p from the saved statistics, and where a row has many keys sum(dout * out) for
sum(p * dp).

The mask of dropout is that of ``ops/_dropout.py``: row (b * heads + h) * q_len + i, column j, where j
counts from the start of its own sequence.
"""

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from llmos_kernels._registry import define, needs_grad, use_reference
from llmos_kernels.ops._attention_arguments import NOT_CAUSAL, TOP_LEFT, check_attention
from llmos_kernels.ops._dropout import draw_seed, keep_mask


def attend(tensors: Sequence, options: tuple, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """out [batch, q_len, heads, v_dim], stats (m, 1 / l) and the dropped weights, per head.

    ``tensors`` and ``options`` are those of ``Arguments``.
    """
    query, key, value, attn_mask, key_padding_mask, cu_q, cu_k = tensors
    scale, causal, dropout_p = options
    query, key, value = _widened(query, key, value, key_padding_mask)
    logits = _logits(query, key, attn_mask, key_padding_mask, cu_q, cu_k, scale, causal)
    weights, stats = _softmax(logits)
    if seed is not None:
        weights = weights * dropout_factors(weights, seed, dropout_p, cu_k)
    return (weights @ value).transpose(1, 2), stats, weights


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights, 0 in rows where every logit is -inf, and stats."""
    m = logits.detach().amax(-1) if logits.shape[-1] else logits.detach().sum(-1)
    m = m.masked_fill(m == float("-inf"), 0)
    p = torch.exp(logits - m[..., None])
    total = p.sum(-1)
    nothing = total == 0
    inverse = total.masked_fill(nothing, 1).reciprocal().masked_fill(nothing, 0)
    return p * inverse[..., None], torch.stack((m, inverse.detach()))


def _widened(query, key, value, key_padding_mask):
    """All three in the accumulation dtype with a key and value for each query head."""
    if key_padding_mask is not None:  # What is ignored may be anything, NaN included.
        ignored = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(ignored, 0), value.masked_fill(ignored, 0)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    acc = torch.promote_types(query.dtype, torch.float32)
    return query.to(acc), key.to(acc), value.to(acc)


def _logits(query, key, attn_mask, key_padding_mask, cu_q, cu_k, scale, causal):
    logits = query @ key.mT * scale
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, float("-inf")) if (
            attn_mask.dtype == torch.bool
        ) else logits + attn_mask.to(logits.dtype)  # fmt: skip
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None], float("-inf"))
    rows = torch.arange(query.shape[2], device=query.device)[:, None]
    cols = torch.arange(key.shape[2], device=query.device)[None]
    offset: int | Tensor = key.shape[2] - query.shape[2]
    if cu_q is not None:
        of_row, of_col = _sequence(cu_q, rows), _sequence(cu_k, cols)
        logits = logits.masked_fill(of_row != of_col, float("-inf"))
        offset = (cu_k.diff() - cu_q.diff())[of_row]
        rows, cols = rows - cu_q[of_row], cols - cu_k[of_col]
    if causal != NOT_CAUSAL:
        last = rows if causal == TOP_LEFT else rows + offset
        logits = logits.masked_fill(cols > last, float("-inf"))
    return logits


def _sequence(cu_seqlens: Tensor, at: Tensor) -> Tensor:
    """The packed sequence that each position belongs to."""
    return torch.searchsorted(cu_seqlens[1:-1].contiguous(), at.int().contiguous(), right=True)


def dropout_factors(weights: Tensor, seed: Tensor, p: float, cu_k: Tensor | None) -> Tensor:
    """0 or 1 / (1 - p) for each of the ``weights`` [batch, heads, q_len, k_len]."""
    cols = weights.shape[-1]
    keep = keep_mask(seed, weights.shape[:-1].numel(), cols, p).view(weights.shape)
    if cu_k is not None:
        at = torch.arange(cols, device=weights.device)
        keep = keep[..., at - cu_k[_sequence(cu_k, at)]]
    return keep.to(weights.dtype) * (1 / (1 - p))


def _forward_reference(q, k, v, attn_mask, padding, cu_q, cu_k, scale, causal, dropout_p, seed):
    tensors, options = (q, k, v, attn_mask, padding, cu_q, cu_k), (scale, causal, dropout_p)
    out, stats, _ = attend(tensors, options, seed)
    return out.to(q.dtype).contiguous(), stats


def _weights_reference(q, k, attn_mask, padding, stats, scale, causal, dropout_p, seed, mean):
    query, key, _ = _widened(q, k, k, padding)
    logits = _logits(query, key, attn_mask, padding, None, None, scale, causal)
    weights = torch.exp(logits - stats[0, ..., None]) * stats[1, ..., None]
    if seed is not None:
        weights = weights * dropout_factors(weights, seed, dropout_p, None)
    return (weights.mean(1) if mean else weights).to(q.dtype)


def _gradients(dout, dweights, tensors, options, seed, stats=None) -> list[Tensor]:
    """Of query, key, value and attn_mask, in the dtype of each; through differentiable torch ops.

    ``dout`` [batch, heads, q_len, v_dim] and ``dweights``, per head, may be None, not both. ``p``
    comes from the ``stats`` of a forward where they are given.
    """
    q, k, v, attn_mask, padding, cu_q, cu_k = tensors
    scale, causal, dropout_p = options
    query, key, value = _widened(q, k, v, padding)
    logits = _logits(query, key, attn_mask, padding, cu_q, cu_k, scale, causal)
    p = _softmax(logits)[0] if stats is None else (
        torch.exp(logits - stats[0, ..., None]) * stats[1, ..., None]
    )  # fmt: skip
    factors = 1 if seed is None else dropout_factors(p, seed, dropout_p, cu_k)
    dp = torch.zeros_like(p) if dweights is None else dweights.to(p.dtype)
    dvalue = torch.zeros_like(value)
    if dout is not None:
        dout = dout.to(p.dtype)
        dp = dp + dout @ value.mT
        dvalue = (p * factors).mT @ dout
    dp = dp * factors
    # The sum of p is 1, or what rounded stats make of it; 0 where nothing is seen.
    ds = p * (dp - (p * dp).sum(-1, keepdim=True) / p.sum(-1, keepdim=True).clamp_min(0.5))

    def of_heads(gradient, t):
        return gradient.unflatten(1, (t.shape[1], -1)).sum(2).to(t.dtype)

    gradients = [of_heads(ds @ key * scale, q), of_heads(ds.mT @ query * scale, k)]
    gradients.append(of_heads(dvalue, v))
    if attn_mask is not None and attn_mask.is_floating_point():
        gradients.append(ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype))
    return gradients


def _backward_reference(
    dout, q, k, v, attn_mask, padding, cu_q, cu_k, out, stats, scale, causal, dropout_p, seed,
    mask_grad,
):  # fmt: skip
    tensors, options = (q, k, v, attn_mask, padding, cu_q, cu_k), (scale, causal, dropout_p)
    dq, dk, dv, *dmask = _gradients(dout, None, tensors, options, seed, stats)
    heads = (d.transpose(1, 2).contiguous() for d in (dq, dk, dv))
    return *heads, dmask[0].contiguous() if mask_grad else q.new_empty(0)


def _forward_fake(q, k, v, attn_mask, padding, cu_q, cu_k, scale, causal, dropout_p, seed):
    batch, heads, q_len, _ = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((batch, q_len, heads, v.shape[-1]))
    return out, q.new_empty((2, batch, heads, q_len), dtype=acc)


def _weights_fake(q, k, attn_mask, padding, stats, scale, causal, dropout_p, seed, mean):
    batch, heads, q_len, _ = q.shape
    return q.new_empty((batch, *(() if mean else (heads,)), q_len, k.shape[2]))


def _backward_fake(
    dout, q, k, v, attn_mask, padding, cu_q, cu_k, out, stats, scale, causal, dropout_p, seed,
    mask_grad,
):  # fmt: skip
    mask = (attn_mask.shape, attn_mask.dtype) if mask_grad else ((0,), q.dtype)
    shapes = [(t.shape[0], t.shape[2], t.shape[1], t.shape[3]) for t in (q, k, v)]
    return *(q.new_empty(s) for s in shapes), q.new_empty(mask[0], dtype=mask[1])


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_padding_mask,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_OPTIONS = "float scale, int causal, float dropout_p, Tensor? seed"

_forward = define(
    f"attention_forward({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor stats)",
    reference=_forward_reference,
    fake=_forward_fake,
    triton="attention:forward",
)
_weights = define(
    "attention_weights(Tensor query, Tensor key, Tensor? attn_mask, Tensor? key_padding_mask,"
    f" Tensor stats, {_OPTIONS}, bool mean) -> Tensor",
    reference=_weights_reference,
    fake=_weights_fake,
    triton="attention_weights:weights",
)
_backward = define(
    f"attention_backward(Tensor dout, {_TENSORS}, Tensor out, Tensor stats, {_OPTIONS},"
    " bool mask_grad) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dattn_mask)",
    reference=_backward_reference,
    fake=_backward_fake,
    triton="attention_backward:backward",
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, attn_mask, padding, cu_q, cu_k, scale, causal, dropout_p, seed, kind
    ):
        tensors, options = (
            (query, key, value, attn_mask, padding, cu_q, cu_k),
            (scale, causal, dropout_p),
        )
        out, stats, weights = _fused(tensors, options, seed, kind)
        ctx.save_for_backward(*tensors, out, stats, seed)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.kind = options, kind
        return (out,) if kind is None else (out, weights)

    @staticmethod
    def backward(ctx, dout, dweights=None):
        *tensors, out, stats, seed = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        none = (None,) * 8
        if dout is None and dweights is None:
            return (None,) * 4 + none
        if dweights is not None or torch.is_grad_enabled():
            # The weights' own gradient, and one to be differentiated again, are plain torch ops.
            if ctx.kind == "mean" and dweights is not None:
                heads = tensors[0].shape[1]
                dweights = (dweights / heads).unsqueeze(1).expand(-1, heads, -1, -1)
            dout = None if dout is None else dout.transpose(1, 2)
            gradients = _gradients(dout, dweights, tensors, ctx.options, seed)
            return *[g if w else None for g, w in zip_longest(gradients, wanted)], *none
        dquery, dkey, dvalue, dmask = _backward(
            dout.transpose(1, 2), *tensors, out, stats, *ctx.options, seed, wanted[3]
        )
        grads = [d.transpose(1, 2) for d in (dquery, dkey, dvalue)]
        return *grads, dmask if wanted[3] else None, *none


def _fused(tensors, options, seed, kind) -> tuple[Tensor, Tensor, Tensor | None]:
    out, stats = _forward(*tensors, *options, seed)
    if kind is None:
        return out, stats, None
    query, key, _, attn_mask, padding, *_ = tensors
    mean = kind == "mean"
    return out, stats, _weights(query, key, attn_mask, padding, stats, *options, seed, mean)


def _by_reference(tensors, options, seed, kind) -> tuple[Tensor, Tensor]:
    out, _, weights = attend(tensors, options, seed)
    weights = weights.mean(1) if kind == "mean" else weights
    dtype = tensors[0].dtype
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``torch.nn.functional.scaled_dot_product_attention``, with every mask on the fused path.

    ``query`` [batch, heads, q_len, head_dim], ``key`` [batch, heads, k_len, head_dim], ``value``
    [batch, heads, k_len, v_dim], any strides, of one dtype: float32, bfloat16 or float16 (float64: the
    reference answers); or all of three dimensions, without heads. Dims from 1 to 256.

    ``attn_mask`` broadcasts to [batch, heads, q_len, k_len]: bool, True where attended, or a float
    that is added, and gets a gradient. ``is_causal`` lets query i see keys up to i, with
    ``bottom_right`` up to i + k_len - q_len. ``enable_gqa`` lets groups of query heads share a key
    head. Dropout acts whenever ``dropout_p`` is not 0, as in torch. ``key_padding_mask``
    [batch, k_len] is True where a key is IGNORED; unlike torch, all masks combine.

    ``cu_seqlens_q`` and ``cu_seqlens_k`` ([sequences + 1], int32, from 0 to the total) mark packed
    sequences: then ``query`` is [total_q, heads, head_dim], ``key`` and ``value`` likewise.

    Returns the attention like ``query`` with v_dim; with ``return_weights`` also the weights
    [batch, heads, q_len, k_len] ("per_head") or their mean over heads [batch, q_len, k_len]
    ("mean"), after dropout as in ``nn.MultiheadAttention``. Under autocast the inputs are cast, as
    torch does. Raises ValueError for shapes, devices or options that disagree, TypeError for dtypes.
    """
    a = check_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_padding_mask,
        cu_seqlens_q, cu_seqlens_k, bottom_right, return_weights,
    )  # fmt: skip
    seed = draw_seed(query.device) if dropout_p else None
    if use_reference(backend, a.tensors[0].dtype):
        return a.shaped(*_by_reference(a.tensors, a.options, seed, a.weights))
    if needs_grad(*a.tensors[:4]):
        if torch.compiler.is_compiling():  # It refuses the same tensor twice.
            a = a.with_views()
        return a.shaped(*_Attention.apply(*a.tensors, *a.options, seed, a.weights))
    out, _, weights = _fused(a.tensors, a.options, seed, a.weights)
    return a.shaped(out, weights)


def scaled_dot_product_attention_reference(*args, **options) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of ``scaled_dot_product_attention``: plain, differentiable, any device and dtype.

    Takes what that takes, but ``backend``.
    """
    return scaled_dot_product_attention(*args, **options, backend="reference")
