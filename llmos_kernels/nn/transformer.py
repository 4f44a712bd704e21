"""The encoder and the decoder layer of the Transformer.

Source: Vaswani et al. 2017, arXiv:1706.03762.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmos_kernels.nn.attention import MultiheadAttention, merge_masks
from llmos_kernels.nn.encoder_layer import LayerParts, whole_layer
from llmos_kernels.nn.feed_forward import activation_name
from llmos_kernels.nn.frozen import Freezable, panels_of
from llmos_kernels.nn.fusible import is_fusible, is_plain_dropout
from llmos_kernels.nn.int8 import activated
from llmos_kernels.nn.linear import linear_parameters
from llmos_kernels.nn.nested import nested_like, nested_rows
from llmos_kernels.nn.norm import LayerNorm, add_and_norm
from llmos_kernels.nn.packed import PackedKeys
from llmos_kernels.ops._encoder_layer import LayerMasks, may_fuse
from llmos_kernels.ops.feed_forward import feed_forward

#: The drop-ins of the parts of a layer.
_FUSED = {nn.MultiheadAttention: MultiheadAttention, nn.LayerNorm: LayerNorm}


#: The classes of ``out_proj``, whose hooks do not run in torch either.
_OUT_PROJECTIONS = (NonDynamicallyQuantizableLinear, nn.Linear)


class _Layer(nn.Module):
    """Base of both layers: their parts, and the feed-forward block."""

    linear1: Any
    linear2: Any
    dropout: Any
    activation: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for child in self.children():
            child.__class__ = _FUSED.get(type(child), type(child))

    def _feed_forward(self, x: Tensor) -> Tensor:
        """Return what the feed-forward block makes of ``x``, before its last dropout."""
        first, second, dropout = self.linear1, self.linear2, self.dropout
        name = activation_name(self.activation)
        hidden = activated(first, x, name) if name else None
        if hidden is not None:
            return second(dropout(hidden))
        weights1, weights2 = linear_parameters(first), linear_parameters(second)
        if name is None or weights1 is None or weights2 is None or not is_plain_dropout(dropout):
            return second(dropout(self.activation(first(x))))
        return feed_forward(x, *weights1, *weights2, name, dropout.p, dropout.training)


class TransformerEncoderLayer(Freezable, _Layer, nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` through the fused attention, feed-forward and norms.

    The state dict is that of torch. Every mask and activation, ``norm_first`` and ``batch_first``
    are supported, forward and backward. The nested tensors that ``nn.TransformerEncoder`` makes of
    padded batches in inference stay nested: nothing is computed for padding.

    Args:
        d_model, nhead, ...: the arguments of ``torch.nn.TransformerEncoderLayer``, unchanged.

    Returns:
        ``forward(src, src_mask, src_key_padding_mask, is_causal)`` takes as ``src`` [length, batch,
        d_model], [batch, length, d_model] if ``batch_first``, or [length, d_model], of the dtype of
        the parameters, and returns a tensor of that shape and dtype. ``src_mask`` is [length,
        length] or [batch * nhead, length, length], ``src_key_padding_mask`` [batch, length]: bool,
        True hides a key, or floating, added to the scores.

    Raises:
        AssertionError, RuntimeError: where torch raises them: shapes disagree.
        ValueError: the head dim is above 256; or ``dropout`` is outside [0, 1] or, in training, 1.
        TypeError: the dtype of ``src`` is not that of the parameters.

    Example:
        >>> layer = TransformerEncoderLayer(512, 8, batch_first=True)
        >>> layer(torch.randn(8, 128, 512)).shape
        torch.Size([8, 128, 512])
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            masked = src_mask is not None or src_key_padding_mask is not None
            rows = src.layout == torch.strided and src.is_contiguous() and src.dim() == 3
            if masked or not rows:
                return super().forward(src, src_mask, src_key_padding_mask, is_causal)

            def attend_nested(x: Tensor) -> Tensor:
                y = nested_like(src, x)
                out = self.self_attn(y, y, y, need_weights=False, is_causal=is_causal)[0]
                return nested_rows(out.contiguous())[0]

            return nested_like(src, self._compute(nested_rows(src)[0], attend_nested))

        if src_mask is None and not is_causal:
            out = self._whole(src, src_key_padding_mask)
            if out is not None:
                return out

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, src_key_padding_mask, False, src_mask, is_causal=is_causal
            )[0]

        return self._compute(src, attend)

    def weights_to_freeze(self) -> list[Tensor]:
        attention = self.self_attn
        together, out = attention.in_proj_weight, attention.out_proj
        first, second = linear_parameters(self.linear1), linear_parameters(self.linear2)
        if together is None or type(out) not in _OUT_PROJECTIONS or not (first and second):
            return []
        return [together, out.weight, first[0], second[0]]

    def is_one_op(self, src: Tensor) -> bool:
        return self._whole(src, None) is not None

    def _whole(self, src: Tensor, padding: Tensor | PackedKeys | None) -> Tensor | None:
        """Return the output by one op, or None where the parts have to be called."""
        attention = self.self_attn
        if type(self) is not TransformerEncoderLayer or type(attention) is not MultiheadAttention:
            return None
        weight = getattr(self.linear1, "weight", None)
        if not isinstance(weight, Tensor):
            return None
        if isinstance(padding, PackedKeys):
            if padding.is_causal:
                return None
            masks = LayerMasks(cu_seqlens=padding.keys.cu_seqlens)
        elif padding is None or padding.dtype == torch.bool:
            masks = LayerMasks(None, padding)
        elif not padding.is_floating_point():
            return None  # The attention refuses it.
        else:
            masks = LayerMasks(*merge_masks(None, padding, attention.num_heads, 0))
        if not may_fuse(src, masks, weight) or not is_fusible(attention):
            return None
        if not attention.batch_first or (attention.training and attention.dropout):
            return None
        weight, out = attention.in_proj_weight, attention.out_proj
        appends = attention.bias_k is not None or attention.add_zero_attn
        if appends or weight is None or type(out) not in _OUT_PROJECTIONS:
            return None
        parts = LayerParts(
            ((weight, attention.in_proj_bias),),
            (out.weight, out.bias),
            self.linear1,
            self.linear2,
            self.norm1,
            self.norm2,
            (self.dropout, self.dropout1, self.dropout2),
            activation_name(self.activation),
            attention.num_heads,
            attention.head_dim**-0.5,
            self.norm_first,
        )
        return whole_layer(src, masks, parts, panels_of(self))

    def _compute(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            y, x = add_and_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            return x + self.dropout2(self._feed_forward(y))
        x, _ = add_and_norm(attend(x), x, self.dropout1, self.norm1)
        return add_and_norm(self._feed_forward(x), x, self.dropout2, self.norm2)[0]


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` through the fused attention, feed-forward and norms.

    The state dict is that of torch. Every mask and activation, ``norm_first`` and ``batch_first``
    are supported, forward and backward.

    Args:
        d_model, nhead, ...: the arguments of ``torch.nn.TransformerDecoderLayer``, unchanged.

    Returns:
        ``forward(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
        memory_key_padding_mask, tgt_is_causal, memory_is_causal)`` takes as ``tgt`` [tgt_len,
        batch, d_model], [batch, tgt_len, d_model] if ``batch_first``, or [tgt_len, d_model], and
        ``memory`` likewise with mem_len, of the dtype of the parameters. It returns a tensor of the
        shape and dtype of ``tgt``. ``tgt_mask`` ends in [tgt_len, tgt_len], ``memory_mask`` in
        [tgt_len, mem_len]; key padding masks are [batch, tgt_len] and [batch, mem_len]. Masks are
        bool, True hides a key, or floating, added to the scores.

    Raises:
        AssertionError, RuntimeError: where torch raises them: shapes disagree.
        ValueError: the head dim is above 256; or ``dropout`` is outside [0, 1] or, in training, 1.
        TypeError: the dtype of ``tgt`` or ``memory`` is not that of the parameters.

    Example:
        >>> layer = TransformerDecoderLayer(512, 8, batch_first=True)
        >>> layer(torch.randn(8, 32, 512), memory=torch.randn(8, 128, 512)).shape
        torch.Size([8, 32, 512])
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, tgt_key_padding_mask, False, tgt_mask, is_causal=tgt_is_causal
            )[0]

        def attend_memory(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x,
                memory,
                memory,
                memory_key_padding_mask,
                False,
                memory_mask,
                is_causal=memory_is_causal,
            )[0]

        x = tgt
        if self.norm_first:
            y, x = add_and_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            y, x = add_and_norm(attend_memory(y), x, self.dropout2, self.norm3)
            return x + self.dropout3(self._feed_forward(y))
        x, _ = add_and_norm(attend(x), x, self.dropout1, self.norm1)
        x, _ = add_and_norm(attend_memory(x), x, self.dropout2, self.norm2)
        return add_and_norm(self._feed_forward(x), x, self.dropout3, self.norm3)[0]
