"""A whole encoder layer of the Transformer at inference, in one call of an op.

    post-norm:  x = LayerNorm1(src + attention(src)),   out = LayerNorm2(x + feed_forward(x))
    pre-norm:   x = src + attention(LayerNorm1(src)),   out = x + feed_forward(LayerNorm2(x))

    attention(x) = concat_h(softmax(q_h k_h^T scale + mask) v_h) out_weight^T + out_bias,
    with q, k, v = x in_weight^T + in_bias
    feed_forward(x) = activation(x weight1^T + bias1) weight2^T + bias2

Each step is rounded as the op of that step rounds. Vaswani et al. 2017, arXiv:1706.03762; pre-norm:
Xiong et al. 2020, arXiv:2002.04745. Few tokens take less time to compute than some ten calls from
Python, so modules ask ``encoder_layer`` first. It computes nothing where a gradient, a trace,
autocast, another device or the product policy is in the way; then their parts do. On GPUs the CUDA
part computes few tokens: norms by its kernels, products by cuBLAS, attention by torch, or where
there is a mask by Triton's launcher, without Python between them.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmos_kernels._core.registry import KERNEL_DTYPES, define, needs_grad, use_reference
from llmos_kernels.ops import _products
from llmos_kernels.ops._activations import NONE
from llmos_kernels.ops._attention_arguments import MAX_DIM
from llmos_kernels.ops._product_policy import are_ours
from llmos_kernels.ops._weight_panels import WeightPanels
from llmos_kernels.ops.attention import scaled_dot_product_attention_reference
from llmos_kernels.ops.layer_norm import add_layer_norm_reference, layer_norm_reference

__all__: list[str] = []

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
#: On GPUs the launches of more tokens than this hide what Python does between them.
_MOST_ON_GPUS = 256


class LayerParameters(NamedTuple):
    """The parameters of an encoder layer, d wide, in the order of the op's schema."""

    in_weights: list[Tensor]  # [3 d, d] of query, key and value; or three [d, d].
    in_biases: list[Tensor]  # As many, or none.
    out_weight: Tensor  # [d, d]
    out_bias: Tensor | None
    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    weight1: Tensor  # [hidden, d]
    bias1: Tensor | None
    weight2: Tensor  # [d, hidden]
    bias2: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None

    def weights(self) -> list[Tensor]:
        """Return the weights of the linear layers."""
        return [*self.in_weights, self.out_weight, self.weight1, self.weight2]

    def tensors(self) -> list[Tensor]:
        """Return all parameters that are not None."""
        rest = (t for t in self[2:] if isinstance(t, Tensor))
        return [*self.in_weights, *self.in_biases, *rest]


class LayerOptions(NamedTuple):
    """The other arguments of an encoder layer, in the order of the op's schema."""

    heads: int
    scale: float  # The factor of the scores.
    activation: int  # An index of ``_activations.NAMES``.
    norm_first: bool
    eps1: float
    eps2: float


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int = NONE) -> Tensor:
    rows = _products.transform(x.flatten(0, -2), weight, bias, activation, 0.0, None)[0]
    return rows.view(*x.shape[:-1], weight.shape[0])


class LayerMasks(NamedTuple):
    """The masks of an encoder layer's attention, as in ``scaled_dot_product_attention``."""

    attn_mask: Tensor | None = None  # Four dimensions that broadcast to [batch, heads, q, key].
    key_padding_mask: Tensor | None = None  # [batch, length], bool, True where a key is ignored.
    cu_seqlens: Tensor | None = None  # [sequences + 1], int32, of rows [1, total, d] without masks.


def _attention(
    x: Tensor, masks: LayerMasks, weights: list[Tensor], biases: list[Tensor], options: Any
) -> Tensor:
    """Return the attention of ``x`` [batch, length, d] before its output projection."""
    given: list[Tensor | None] = [*biases] if biases else [None] * len(weights)
    parts = (_linear(x, w, b) for w, b in zip(weights, given, strict=True))
    batch, length, d = x.shape
    qkv = torch.cat([*parts], -1).view(batch, length, 3, options.heads, d // options.heads)
    heads = qkv.permute(2, 0, 3, 1, 4).unbind()
    if masks.cu_seqlens is not None:
        heads = tuple(t.squeeze(0).transpose(0, 1) for t in heads)
        cu = {"cu_seqlens_q": masks.cu_seqlens, "cu_seqlens_k": masks.cu_seqlens}
        out: Any = scaled_dot_product_attention_reference(*heads, **cu, scale=options.scale)
        return out.reshape(x.shape)
    out = scaled_dot_product_attention_reference(
        *heads, masks.attn_mask, key_padding_mask=masks.key_padding_mask, scale=options.scale
    )
    return out.transpose(1, 2).reshape(x.shape)


def reference(
    src: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    in_weights: list[Tensor],
    in_biases: list[Tensor],
    *rest: Any,
) -> Tensor:
    """Return the layer by the references of its parts; the arguments are those of the schema."""
    out_weight, out_bias, w1, b1, weight1, bias1, weight2, bias2, w2, b2, *_ = rest
    options, shape = LayerOptions(*rest[10:-1]), src.shape[2:]
    masks = LayerMasks(attn_mask, key_padding_mask, cu_seqlens)

    def attend(x: Tensor) -> Tensor:
        out = _attention(x, masks, in_weights, in_biases, options)
        return _linear(out, out_weight, out_bias)

    def feed_forward(x: Tensor) -> Tensor:
        return _linear(_linear(x, weight1, bias1, options.activation), weight2, bias2)

    if src.numel() == 0:
        return src.clone()
    if options.norm_first:
        y = attend(layer_norm_reference(src, shape, w1, b1, options.eps1))
        y, x = add_layer_norm_reference(y, src, shape, w2, b2, options.eps2)
        return x + feed_forward(y)
    x, _ = add_layer_norm_reference(attend(src), src, shape, w1, b1, options.eps1)
    return add_layer_norm_reference(feed_forward(x), x, shape, w2, b2, options.eps2)[0]


def _flops(src: Tensor, *rest: Any) -> int:
    batch, length, d = src.shape
    _, _, _, in_weights, _, out_weight, _, _, _, weight1, _, weight2, *_ = rest
    weights = sum(w.numel() for w in (*in_weights, out_weight, weight1, weight2))
    return 2 * batch * length * (weights + 2 * length * d)


_op = define(
    "encoder_layer(Tensor src, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? cu_seqlens,"
    " Tensor[] in_weights, Tensor[] in_biases,"
    " Tensor out_weight, Tensor? out_bias, Tensor? norm1_weight, Tensor? norm1_bias,"
    " Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2,"
    " Tensor? norm2_weight, Tensor? norm2_bias,"
    " int heads, float scale, int activation, bool norm_first, float eps1, float eps2,"
    " Tensor[] panels) -> Tensor",
    reference=reference,
    fake=lambda src, *_: src.new_empty(src.shape),
    flops=_flops,
)


@functools.cache
def _is_built(device_type: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "llmos::encoder_layer", key
    )


def may_fuse(src: Tensor, masks: LayerMasks, weight: Tensor) -> bool:
    """Return False where the inputs alone show that the op does not compute an encoder layer.

    Args:
        src: the layer's input.
        masks: its masks.
        weight: one of its weights.
    """
    # Nothing after the first line may enter a traced graph.
    if _products.is_traced(src) or torch._C._get_tracing_state() is not None:
        return False
    kind = src.device.type
    if not _is_built(kind) or needs_grad(src, masks.attn_mask, weight):
        return False
    if torch.is_autocast_enabled(kind):
        return False
    return _is_input(src) and _are_masks(masks, src)


def encoder_layer(
    src: Tensor,
    masks: LayerMasks,
    parameters: LayerParameters,
    options: LayerOptions,
    panels: WeightPanels | None = None,
) -> Tensor | None:
    """Return an encoder layer of ``src`` by one op; None where its parts have to compute it.

    Args:
        src: [batch, length, d], for which ``may_fuse`` holds.
        masks: the masks of its attention.
        parameters: the parameters.
        options: the other arguments.
        panels: the copies of ``parameters.weights()``, if the module is frozen.

    Returns:
        [batch, length, d], or None.

    Raises:
        RuntimeError: a bias or the weight of a norm has another size than its layer.
    """
    tensors, dtype, device = parameters.tensors(), src.dtype, src.device
    if needs_grad(*tensors):
        return None
    if any(type(t) not in _PLAIN or t.dtype is not dtype or t.device != device for t in tensors):
        return None
    batch, length, d = src.shape
    weights = parameters.weights()
    shapes = tuple(w.shape for w in weights)
    if d > MAX_DIM * options.heads or d % options.heads or not _fit(d, shapes):
        return None
    if masks.attn_mask is not None and masks.attn_mask.shape[1] not in (1, options.heads):
        return None
    if src.is_cuda:
        few = batch * length <= _MOST_ON_GPUS
        return _op(src, *masks, *parameters, *options, []) if few else None
    if not are_ours(dtype, device, batch * length, shapes):
        return None
    if panels is None or any(w.is_inference() for w in weights):
        return _op(src, *masks, *parameters, *options, [])
    return _op(src, *masks, *parameters, *options, panels.of(weights))


def _is_input(src: Tensor) -> bool:
    return (
        type(src) in _PLAIN
        and src.layout == torch.strided
        and not src.is_nested
        and src.dim() == 3
        and src.is_contiguous()
        and src.dtype in KERNEL_DTYPES
        and not use_reference(None, src.dtype)
    )


def _are_masks(masks: LayerMasks, src: Tensor) -> bool:
    mask, padding, _ = masks  # cu_seqlens are our own.
    if padding is not None:
        is_padding = padding.dtype == torch.bool and padding.shape == src.shape[:2]
        if not (type(padding) in _PLAIN and padding.device == src.device and is_padding):
            return False
    if mask is None:
        return True
    batch, length, _ = src.shape
    if type(mask) not in _PLAIN or mask.device != src.device or mask.dim() != 4:
        return False
    fits = mask.shape[0] in (1, batch) and {*mask.shape[2:]} <= {1, length}
    return fits and (mask.dtype == torch.bool or mask.dtype in KERNEL_DTYPES)


@functools.lru_cache
def _fit(d: int, shapes: tuple[torch.Size, ...]) -> bool:
    """Return True if weights of these shapes are those of a layer of width ``d``."""
    *in_shapes, out, first, second = shapes
    together, apart = [(3 * d, d)], [(d, d)] * 3
    widths = len(first) == 2 and first[1] == d and second == (d, first[0])
    return in_shapes in (together, apart) and out == (d, d) and widths
