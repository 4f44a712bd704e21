"""What an encoder layer consists of, and its computation by one op where the parts allow it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from llmos_kernels.nn.fusible import drops_nothing
from llmos_kernels.nn.linear import linear_parameters
from llmos_kernels.nn.norm import is_plain_norm
from llmos_kernels.ops._activations import code_of
from llmos_kernels.ops._encoder_layer import (
    LayerMasks,
    LayerOptions,
    LayerParameters,
    encoder_layer,
)
from llmos_kernels.ops._weight_panels import WeightPanels

WeightAndBias = tuple[Tensor, Tensor | None]


class LayerParts(NamedTuple):
    """The parts of an encoder layer, as they are at the moment of a call."""

    projections: Iterable[WeightAndBias | None]  # Of query, key and value: one, or three.
    project_out: WeightAndBias | None
    linear1: Any
    linear2: Any
    norm1: Any
    norm2: Any
    dropouts: Iterable[Any]
    activation: str | None  # Its name; None for one that cannot be fused.
    heads: int
    scale: float
    norm_first: bool


def whole_layer(
    src: Tensor, masks: LayerMasks, parts: LayerParts, panels: WeightPanels | None
) -> Tensor | None:
    """Return the layer's output by one op, or None where the parts have to be called.

    Args:
        src: [batch, length, d], for which ``ops._encoder_layer.may_fuse`` holds.
        masks: the masks of its attention.
        parts: the parts of the layer.
        panels: the copies of its weights, if it is frozen.
    """
    norm1, norm2 = parts.norm1, parts.norm2
    if not (is_plain_norm(norm1) and is_plain_norm(norm2)):
        return None
    if not all(map(drops_nothing, parts.dropouts)):
        return None
    first, second = linear_parameters(parts.linear1), linear_parameters(parts.linear2)
    if parts.activation is None or first is None or second is None or parts.project_out is None:
        return None
    width = (src.shape[-1],)
    if norm1.normalized_shape != width or norm2.normalized_shape != width:
        return None
    weights, biases = [], []
    for projection in parts.projections:
        if projection is None:
            return None
        weights.append(projection[0])
        if projection[1] is not None:
            biases.append(projection[1])
    if biases and len(biases) != len(weights):
        return None
    parameters = LayerParameters(
        weights,
        biases,
        *parts.project_out,
        norm1.weight,
        norm1.bias,
        *first,
        *second,
        norm2.weight,
        norm2.bias,
    )
    code = code_of(parts.activation)
    options = LayerOptions(parts.heads, parts.scale, code, parts.norm_first, norm1.eps, norm2.eps)
    return encoder_layer(src, masks, parameters, options, panels)
