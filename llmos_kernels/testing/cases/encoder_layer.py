"""Checks and calls of the encoder layer op, for tests and ``verify``.

It is no ``Case``: it has no gradient, where a layer's parts are called instead.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels._core.numerics import Compared, judged_together
from llmos_kernels.ops import _activations
from llmos_kernels.ops._encoder_layer import LayerMasks, LayerOptions, LayerParameters, reference

#: (batch, length, d, hidden, heads): one token, odd sizes, GEMV and GEMM, several blocks.
SHAPES = (
    (1, 1, 6, 10, 2),
    (3, 1, 20, 7, 4),
    (2, 5, 33, 65, 3),
    (1, 12, 48, 192, 4),
    (3, 37, 40, 130, 5),
    (2, 150, 24, 72, 2),
)
#: What varies besides the shape, see ``make``.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"mask": "padding", "apart": True},
    {"mask": "added", "norm_first": True, "activation": "relu"},
    {"mask": "causal", "norm_first": True, "bias": False, "apart": True, "activation": "gelu_tanh"},
    {"mask": "padding", "bias": False, "affine": False, "activation": "silu"},
    {"mask": "packed"},
    {"mask": "packed", "norm_first": True, "apart": True},
)
#: Draws of each shape and variant, which are judged together.
DRAWS = 4


class Arguments(NamedTuple):
    """The arguments of the op: input, masks, parameters and options."""

    src: Tensor
    masks: LayerMasks
    parameters: LayerParameters
    options: LayerOptions

    def flat(self, panels: Sequence[Tensor] = ()) -> tuple:
        """Return the arguments as the schema lists them, with copies of the weights if given."""
        return self.src, *self.masks, *self.parameters, *self.options, [*panels]

    def to(self, dtype: torch.dtype) -> "Arguments":
        """Return the same arguments with all floating-point tensors in ``dtype``."""

        def cast(value: Any) -> Any:
            if isinstance(value, list):
                return list(map(cast, value))
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if is_float else value

        parameters = LayerParameters(*map(cast, self.parameters))
        masks = LayerMasks(*map(cast, self.masks))
        return Arguments(cast(self.src), masks, parameters, self.options)


def make(
    shape: tuple[int, ...],
    mask: str | None = None,
    *,
    apart: bool = False,
    bias: bool = True,
    affine: bool = True,
    norm_first: bool = False,
    activation: str = "gelu",
    **options: Any,
) -> Arguments:
    """Return random arguments.

    Args:
        shape: (batch, length, d, hidden, heads).
        mask: "padding", where a sequence may have no other keys; "added" to the scores of each
            key, "causal"; or None.
        apart: whether query, key and value have a weight each.
        bias: whether linear layers and norms have biases.
        affine: whether norms have weights and biases.
        norm_first: see ``LayerOptions``.
        activation: its name.
        options: dtype and device.
    """
    batch, length, d, hidden, heads = shape

    def weight(outer: int, inner: int) -> Tensor:
        return (torch.rand(outer, inner, **options) * 2 - 1) * 1.7 * max(inner, 1) ** -0.5

    def vector(n: int, mean: float = 0.0) -> Tensor:
        return mean + torch.randn(n, **options) / 4

    in_sizes = [d] * 3 if apart else [3 * d]
    norm_weight = vector(d, 1.0) if affine else None
    norm_bias = vector(d) if affine and bias else None
    parameters = LayerParameters(
        [weight(n, d) for n in in_sizes],
        [vector(n) for n in in_sizes] if bias else [],
        weight(d, d),
        vector(d) if bias else None,
        norm_weight,
        norm_bias,
        weight(hidden, d),
        vector(hidden) if bias else None,
        weight(d, hidden),
        vector(d) if bias else None,
        norm_weight,
        norm_bias,
    )
    keys = torch.arange(length, device=options.get("device"))
    hidden_keys = keys >= torch.linspace(length, 0, batch, device=keys.device)[:, None]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=keys.device).tril()
    masks = {
        None: LayerMasks(),
        "padding": LayerMasks(None, hidden_keys),
        "added": LayerMasks(torch.randn(batch, 1, 1, length, **options)),
        "causal": LayerMasks(causal),
    }
    # Sequences of different lengths, empty ones too, as one.
    part = torch.linspace(0, 1, max(batch, 1) + 1, device=keys.device) ** 2
    masks["packed"] = LayerMasks(cu_seqlens=(part * batch * length).int())
    if mask == "packed":
        batch, length = 1, batch * length
    code = _activations.code_of(activation)
    scale = (d // heads) ** -0.5
    return Arguments(
        torch.randn(batch, length, d, **options),
        masks[mask],
        parameters,
        LayerOptions(heads, scale, code, norm_first, 1e-5, 1e-6),
    )


def eager(given: Arguments) -> Tensor:
    """Return the layer by torch's functions, in the dtype of ``given``."""
    src, (mask, padding, cu_seqlens), p, options = given
    batch, length, d = src.shape
    if cu_seqlens is not None:
        sequence = torch.arange(length, device=src.device)[:, None] >= cu_seqlens[1:]
        mask = (sequence.sum(1)[:, None] == sequence.sum(1))[None, None]

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x, (d,), weight, bias, eps)

    def attention(x: Tensor) -> Tensor:
        biases: list[Tensor | None] = [*p.in_biases] or [None for _ in p.in_weights]
        pairs = zip(p.in_weights, biases, strict=True)
        qkv = torch.cat([F.linear(x, *pair) for pair in pairs], -1)
        q, k, v = qkv.view(batch, length, 3, options.heads, d // options.heads).permute(
            2, 0, 3, 1, 4
        )
        scores = q @ k.mT * options.scale
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        elif mask is not None:
            scores = scores + mask
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], -math.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)  # A row without keys is 0.
        return F.linear((weights @ v).transpose(1, 2).flatten(2), p.out_weight, p.out_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = _activations.activate(F.linear(x, p.weight1, p.bias1), options.activation)
        return F.linear(hidden, p.weight2, p.bias2)

    first = p.norm1_weight, p.norm1_bias, options.eps1
    second = p.norm2_weight, p.norm2_bias, options.eps2
    if options.norm_first:
        x = src + attention(norm(src, *first))
        return x + feed_forward(norm(x, *second))
    x = norm(src + attention(src), *first)
    return norm(x + feed_forward(x), *second)


def compare(given: Arguments) -> Compared:
    """Return the output of the op, that of its reference in float64, and torch's."""
    exact = reference(*given.to(torch.float64).flat())
    return {"output": (torch.ops.llmos.encoder_layer(*given.flat()), exact, eager(given))}


def worst_error(dtype: torch.dtype, device: str) -> float:
    """Return the largest error over budget on any shape, with any variant."""
    worst = 0.0
    for shape in SHAPES:
        for variant in VARIANTS:
            torch.manual_seed(0)
            draws = [make(shape, **variant, dtype=dtype, device=device) for _ in range(DRAWS)]
            worst = max(worst, *judged_together(map(compare, draws)).values())
    return worst
