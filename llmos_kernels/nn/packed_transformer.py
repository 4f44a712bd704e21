"""``nn.TransformerEncoder`` and ``nn.TransformerDecoder`` that compute tokens alone.

Source of the layers: Vaswani et al. 2017, arXiv:1706.03762.
"""

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.norm import LayerNorm
from llmos_kernels.nn.packed import Packed, PackedKeys
from llmos_kernels.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from llmos_kernels.ops._products import is_traced

_NORMS = (type(None), nn.LayerNorm, LayerNorm)


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder`` that computes the tokens of padded batches alone.

    Its layers are ``lk.nn.TransformerEncoderLayer``. It does so in eval and in train mode, where
    ``src_key_padding_mask`` hides keys and ``mask`` is None or causal; other calls run as in torch.

    Args:
        encoder_layer, num_layers, ...: the arguments of ``torch.nn.TransformerEncoder``.

    Returns:
        ``forward(src, mask, src_key_padding_mask, is_causal)``: as torch, but 0 at padding.

    Raises:
        RuntimeError, AssertionError: where torch raises them: shapes disagree.

    Example:
        >>> layer = llmos_kernels.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> padding = torch.arange(9) >= torch.tensor([[9], [2]])
        >>> TransformerEncoder(layer, 2)(torch.randn(2, 9, 64), None, padding).shape
        torch.Size([2, 9, 64])
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        packed = causal = None
        if not _memory.is_read and why_not(self) == "":
            packed = _packed(src, src_key_padding_mask, self.layers[0])
            causal = None if packed is None else _is_causal(mask, is_causal, packed)
        if causal is None:
            packed = None
        if packed is None or packed.is_whole:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        batch_first = _is_batch_first(self.layers[0])
        keys: Any = PackedKeys(packed, packed, bool(causal))
        x = _taken(packed, src, batch_first)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=keys)
        return _put(packed, x if self.norm is None else self.norm(x), batch_first)


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder`` that computes tokens, of target and memory, alone.

    Its layers are ``lk.nn.TransformerDecoderLayer``. It does so in eval and in train mode, where a
    key padding mask hides keys, ``memory_mask`` is None and ``tgt_mask`` None or causal; other
    calls run as in torch.

    Args:
        decoder_layer, num_layers, ...: the arguments of ``torch.nn.TransformerDecoder``.

    Returns:
        ``forward(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
        memory_key_padding_mask, tgt_is_causal, memory_is_causal)``: as torch, but 0 at padding.

    Raises:
        RuntimeError, AssertionError: where torch raises them: shapes disagree.

    Example:
        >>> layer = llmos_kernels.nn.TransformerDecoderLayer(64, 4, batch_first=True)
        >>> tgt, memory = torch.randn(2, 5, 64), torch.randn(2, 9, 64)
        >>> padding = torch.arange(9) >= torch.tensor([[9], [2]])
        >>> TransformerDecoder(layer, 2)(tgt, memory, memory_key_padding_mask=padding).shape
        torch.Size([2, 5, 64])
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        queries = keys = causal = None
        if memory_mask is None and not memory_is_causal and why_not(self) == "":
            queries = _packed(tgt, tgt_key_padding_mask, self.layers[0])
            keys = _packed(memory, memory_key_padding_mask, self.layers[0])
        if queries is not None and keys is not None and queries.batch == keys.batch:
            causal = _is_causal(tgt_mask, tgt_is_causal, queries)
        if causal is None:
            queries = keys = None
        if queries is None or keys is None or (queries.is_whole and keys.is_whole):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        batch_first = _is_batch_first(self.layers[0])
        x, given = _taken(queries, tgt, batch_first), _taken(keys, memory, batch_first)
        own: Any = PackedKeys(queries, queries, bool(causal))
        others: Any = PackedKeys(queries, keys)
        for layer in self.layers:
            x = layer(x, given, tgt_key_padding_mask=own, memory_key_padding_mask=others)
        return _put(queries, x if self.norm is None else self.norm(x), batch_first)


class Transformer(nn.Transformer):
    """``torch.nn.Transformer`` whose encoder and decoder compute tokens alone.

    Memory at padding is read, and so computed, where ``src_key_padding_mask`` is given and
    ``memory_key_padding_mask`` is not.

    Args:
        d_model, nhead, ...: the arguments of ``torch.nn.Transformer``. Encoder and decoder are
            ``lk.nn.TransformerEncoder`` and ``TransformerDecoder`` where they are given as such, or
            after ``optimize(skip_padding=True)``.

    Returns:
        ``forward(src, tgt, ...)``: as torch, but 0 at padding.

    Raises:
        RuntimeError, AssertionError: where torch raises them: shapes disagree.

    Example:
        >>> model = torch.nn.Transformer(64, 4, 2, 2, batch_first=True).eval()
        >>> report = llmos_kernels.optimize(model, skip_padding=True, verify=False)
        >>> type(model).__name__, report.padding[0].skipped
        ('Transformer', True)
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        hides = given.get("src_key_padding_mask") is not None
        before = _memory.is_read
        _memory.is_read = hides and given.get("memory_key_padding_mask") is None
        try:
            return super().forward(*args, **kwargs)
        finally:
            _memory.is_read = before


class _Memory(threading.local):
    #: Whether a decoder reads what an encoder of this thread returns at padding.
    is_read = False


_memory = _Memory()
_ARGUMENTS = tuple(inspect.signature(nn.Transformer.forward).parameters)[1:]

#: The stacks of torch, and what they become.
STACKS: dict[type, type] = {
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
}
_LAYERS = (TransformerEncoderLayer, TransformerDecoderLayer)


def why_not(stack: Any) -> str:
    """Return why the layers of a stack cannot compute tokens alone, or an empty string."""
    for layer in stack.layers:
        if type(layer) not in _LAYERS:
            return f"a layer is a {type(layer).__name__}, not swapped"
        attentions = [m for m in layer.children() if isinstance(m, nn.MultiheadAttention)]
        if any(m.bias_k is not None or m.add_zero_attn for m in attentions):
            return "its attention adds a key (add_bias_kv, add_zero_attn)"
    if type(stack.norm) not in _NORMS:
        return f"its norm is a {type(stack.norm).__name__}"
    return "" if len(stack.layers) else "it has no layers"


def _is_batch_first(layer: Any) -> bool:
    return layer.self_attn.batch_first


def _is_causal(mask: Tensor | None, hint: bool | None, packed: Packed) -> bool | None:
    """Return whether a mask of torch is causal; None for another mask, or a wrong one.

    A mask is looked at on CPUs; elsewhere that would wait for the device, and the hint counts.
    """
    if mask is None:
        return None if hint else False
    if mask.shape != (packed.length, packed.length) or is_traced(mask):
        return None
    if mask.device.type != "cpu":
        return True if hint else None
    hidden = mask if mask.dtype == torch.bool else mask == float("-inf")
    if not torch.equal(hidden, torch.ones_like(hidden).triu(1)):
        return None
    return True if mask.dtype == torch.bool or not mask.tril().any() else None


def _packed(x: Tensor, padding: Tensor | None, layer: Any) -> Packed | None:
    """Return the pack of ``x`` with a key padding mask of torch; None where torch has to look."""
    if torch.compiler.is_compiling() or is_traced(x) or x.is_nested or x.ndim != 3:
        return None
    batch, length = x.shape[:2] if _is_batch_first(layer) else x.shape[1::-1]
    if padding is None:
        return Packed.whole(batch, length, x.device)
    if padding.shape != (batch, length) or padding.device != x.device:
        return None
    if padding.dtype == torch.bool:
        return Packed.of(~padding)
    if padding.dtype != x.dtype:
        return None
    hidden = padding == float("-inf")
    added = padding.masked_fill(hidden, 0).any()  # A float mask may do more than hide keys.
    return Packed.of(~hidden, [added])


def _taken(packed: Packed, x: Tensor, batch_first: bool) -> Tensor:
    """Return the tokens of ``x`` as the layers take them: [1, total, d] or [total, 1, d]."""
    return packed.take(x) if batch_first else packed.take(x.transpose(0, 1)).transpose(0, 1)


def _put(packed: Packed, rows: Tensor, batch_first: bool) -> Tensor:
    """Return what layers have made of ``_taken`` in the batch again."""
    return packed.put(rows) if batch_first else packed.put(rows.transpose(0, 1)).transpose(0, 1)
