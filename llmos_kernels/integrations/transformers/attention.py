"""The attention function "llmos" for Hugging Face transformers, and its mask function.

Importing this module registers both.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from llmos_kernels._core.registry import needs_grad
from llmos_kernels.nn.packed import Packed, attend_varlen
from llmos_kernels.ops.attention import scaled_dot_product_attention

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # It is private to transformers, and may be gone.
    _active_collector = None  # type: ignore[assignment]

__all__ = ["NAME", "attention"]


class AttentionName(str):
    """A name of an attention in a config.

    Unpickling a config imports this module for it, so that the name is registered in every process.
    """


#: The name under which transformers knows the attention function.
NAME = AttentionName("llmos")

#: Arguments that models pass along although they change no attention.
_HARMLESS = frozenset(
    (
        "cache_position",
        "deterministic",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "offset_mapping",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "special_tokens_mask",
        "token_type_ids",
        "use_cache",
    )
)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Packed | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return attention and weights, as transformers' ``AttentionInterface`` asks for them.

    Without a mask the attention is causal where ``is_causal`` says so, or ``module.is_causal`` if
    that is None, and there is more than one query.

    Args:
        module: the attention module of the model. Dropout is on where it is in train mode.
        query: [batch, heads, q_len, head_dim].
        key: [batch, kv_heads, k_len, head_dim]; ``heads`` is a multiple of ``kv_heads``.
        value: [batch, kv_heads, k_len, v_dim].
        attention_mask: bool or float, broadcastable to [batch, heads, q_len, k_len]; or the
            ``Packed`` of a batch without its padding.
        dropout: the probability of dropping a weight.
        scaling: the factor of the scores. Default: 1 / sqrt(head_dim).
        is_causal: whether a query sees no later key.
        position_bias: [1 or batch, heads, q_len, k_len], is added to the scores and gets a
            gradient.
        sliding_window: the width of a window, which the mask must apply.
        cu_seq_lens_q: int [sequences + 1], where sequences begin that follow one another in a batch
            of 1.
        cu_seq_lens_k: the same of the keys. Default: that of the queries.
        output_attentions: whether weights are returned.
        softcap: bounds the scores before the mask, as in Gemma 2.
        s_aux: [heads], attention sinks, as in gpt-oss; gets a gradient.

    Returns:
        The attention [batch, q_len, heads, v_dim]; and the weights [batch, heads, q_len, k_len], or
        None.

    Raises:
        NotImplementedError: another argument is given that could change the result; no mask applies
            the window; or ``cu_seq_lens_q`` comes with a larger batch or a ``position_bias``.

    Example:
        >>> q = k = v = torch.randn(2, 8, 128, 64)
        >>> out, weights = attention(torch.nn.Module(), q, k, v, None)
    """
    for name, given in kwargs.items():
        if name not in _HARMLESS and given is not None and given is not False:
            shown = f"a {type(given).__name__}" if isinstance(given, Tensor) else repr(given)
            raise NotImplementedError(f'the "llmos" attention does not support {name}: got {shown}')
    if sliding_window is not None and attention_mask is None and key.shape[2] > sliding_window:
        raise NotImplementedError(
            f"sliding_window={sliding_window} needs a mask that applies it to {key.shape[2]} keys"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # A single query without a mask is the newest position of a KV cache, which sees all keys.
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
    options: dict[str, Any] = {
        "dropout_p": dropout if module.training else 0.0,
        "is_causal": is_causal,
        "scale": scaling,
        "enable_gqa": True,
        "softcap": softcap,
        "sinks": s_aux,
    }
    if cu_seq_lens_q is not None and attention_mask is None:
        if query.shape[0] != 1 or position_bias is not None:
            raise NotImplementedError(
                "cu_seq_lens_q goes with a batch of 1 and no position_bias,"
                f" got {query.shape[0]} and {'one' if position_bias is not None else 'none'}"
            )
        cu_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        return attend_varlen(query, key, value, cu_seq_lens_q.int(), cu_k.int(), **options), None
    needs_weights = output_attentions or are_weights_collected(module)
    if isinstance(attention_mask, Packed):
        no_bias = position_bias is None and sliding_window is None and not needs_weights
        if not no_bias or key.shape[2] != query.shape[2]:
            raise NotImplementedError(
                "packed batches have no relative positions, windows, cross attention or weights"
            )
        cu = attention_mask.cu_seqlens
        return attend_varlen(query, key, value, cu, cu, **options), None
    attn_mask, padding = key_padding_of(attention_mask, query.shape[0])
    if position_bias is not None:
        attn_mask = _biased(position_bias, attn_mask)
    result = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        key_padding_mask=padding,
        return_weights="per_head" if needs_weights else None,
        **options,
    )
    out, weights = result if isinstance(result, tuple) else (result, None)
    if weights is not None and needs_grad(weights):
        # As in eager attention the output is computed from the weights: they can retain a gradient.
        out = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    return out.transpose(1, 2), weights


def are_weights_collected(module: nn.Module) -> bool:
    """Return whether transformers collects attention weights without saying so to the attention.

    Layers of GPT-2, OPT and others do not pass ``output_attentions`` on.
    """
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    return any(name.endswith("attentions") for name in _collected())


def collected_states() -> list[list[Tensor]]:
    """Return the lists of hidden states that transformers collects while a model runs."""
    return [of for name, of in _collected().items() if name == "hidden_states"]


def _collected() -> dict[str, list[Tensor]]:
    if _active_collector is None or torch.compiler.is_compiling():
        return {}
    return _active_collector.get() or {}


def key_padding_of(mask: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Return ``mask`` as attn_mask; or as key_padding_mask, if all heads and queries have the same.

    The key_padding_mask is [batch, k_len], and True hides a key.
    """
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return mask, None
    if mask.shape[2] > 1 and mask.stride(2) != 0:
        return mask, None
    return None, ~mask[:, 0, 0].expand(batch, -1)


def _biased(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``position_bias`` with ``mask`` applied, as a float mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask


def attention_mask(*, q_length: int, **options: Any) -> Tensor | None:
    """Return the mask for ``attention``, as transformers' ``AttentionMaskInterface`` asks for it.

    Args:
        q_length: the number of queries.
        options: the other arguments of transformers' ``sdpa_mask``.

    Returns:
        None where the mask is plainly causal or full, else bool [batch, 1, q_len, k_len]; expanded
        from one query where all of them see the same keys, so that ``attention`` can tell.

    Example:
        >>> attention_mask(batch_size=2, q_length=3, kv_length=3, allow_is_causal_skip=False).shape
        torch.Size([2, 1, 3, 3])
    """
    plain = options.get("mask_function") is bidirectional_mask_function
    if not plain or options.get("use_vmap"):
        return sdpa_mask(q_length=q_length, **options)
    mask = sdpa_mask(q_length=1, **options)
    return None if mask is None else mask.expand(-1, -1, q_length, -1)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)
