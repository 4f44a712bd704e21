"""Cases of linear layers and feed-forward blocks.

A shape is (*batch, in_features, out_features), or (*batch, d_model, dim_feedforward).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels.ops import _activations, feed_forward, linear
from llmos_kernels.ops._dropout import draw_seed, dropout_reference
from llmos_kernels.testing.cases.case import Case


def _parameters(
    inner: int, outer: int, bias: bool, requires_grad: bool = False, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Return a weight [outer, inner] and a bias or None, at the scale of torch's initialisation."""
    bound = max(inner, 1) ** -0.5
    weight = (torch.rand(outer, inner, **options) * 2 - 1) * 1.7 * bound
    biases = (torch.rand(outer, **options) * 2 - 1) * bound if bias else None
    if biases is not None:
        biases = biases.detach().requires_grad_(requires_grad)
    return weight.detach().requires_grad_(requires_grad), biases


def _make(shape: tuple[int, ...], layers: int = 1, bias: bool = True, **options: Any) -> tuple:
    """Return the input, and the weight and bias of each layer."""
    *batch, inner, outer = shape
    x = torch.randn(*batch, inner, **options)
    first = _parameters(inner, outer, bias, **options)
    return x, *first, *(_parameters(outer, inner, bias, **options) if layers == 2 else ())


def _eager_linear(activation: str | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``activation(x @ weight.T + bias)`` by torch's ops."""
    return _activations.activate(F.linear(x, weight, bias), _activations.code_of(activation))


def _eager_block(
    activation: str | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return a feed-forward block by torch's ops, with ``dropout`` between its layers."""
    h = _eager_linear(activation, x, weight1, bias1)
    return F.linear(dropout(h) if dropout else h, weight2, bias2)


def _our_dropout(p: float, h: Tensor) -> Tensor:
    """Return ``h`` with the elements dropped that our kernels drop."""
    rows = h.reshape(h.shape[:-1].numel(), h.shape[-1])
    return dropout_reference(rows, draw_seed(h.device), p).view(h.shape)


#: Empty, one element, primes, powers of two and their neighbours, several blocks in each dimension.
SHAPES = (
    (0, 8, 16),
    (3, 0, 8),
    (3, 8, 0),
    (1, 1, 1),
    (2, 3, 5, 7),
    (1, 300, 33),
    (4, 129, 260),
    (17, 31, 65),
    (130, 72, 40),
    (67, 520, 97),
)
_VARIANT_SHAPES = ((3, 65, 40), (2, 17, 40, 130))
#: Training and inference of a base model, a small encoder, and one token of a large decoder.
BENCHMARK_SHAPES = ((1024, 768, 3072), (128, 384, 1536), (1, 4096, 16384))
#: Layers of a small encoder, of a base model, and of a small one on a single sentence.
LAYER_SHAPES = (
    (2048, 384, 1536),
    (2048, 384, 384),
    (2048, 1536, 384),
    (1024, 768, 768),
    (64, 384, 1536),
    (16, 384, 384),
)
GPU_BENCHMARK_SHAPES = ((8192, 384, 1536), (8192, 1024, 4096), (8192, 4096, 16384))


def _case(
    name: str,
    *,
    layers: int,
    activation: str | None,
    bias: bool = True,
    dropout_p: float = 0.0,
    shapes: tuple = _VARIANT_SHAPES,
    benchmark_shapes: tuple = (),
) -> Case:
    """Return the case of a linear layer or, of two ``layers``, of a feed-forward block."""
    module, op = (feed_forward, "feed_forward") if layers == 2 else (linear, "linear")
    options: dict[str, Any] = {"activation": activation}
    eager = functools.partial(_eager_block if layers == 2 else _eager_linear, activation)
    baseline = None
    if dropout_p:
        options |= {"dropout_p": dropout_p, "training": True}
        baseline = functools.partial(eager, dropout=functools.partial(F.dropout, p=dropout_p))
        eager = functools.partial(eager, dropout=functools.partial(_our_dropout, dropout_p))
    return Case(
        name,
        functools.partial(getattr(module, op), **options),
        functools.partial(getattr(module, f"{op}_reference"), **options),
        eager,
        functools.partial(_make, layers=layers, bias=bias),
        shapes,
        benchmark_shapes,
        GPU_BENCHMARK_SHAPES if benchmark_shapes else (),
        baseline,
        small_shape=lambda n: (n, 24, 40),
        gradcheck_shape=(3, 2, 4),
        multi_block_shape=(67, 96, 129),
        compile_widths=(64, 768, 3072),
        row_wise=False,
    )


LINEAR = (
    _case("linear", layers=1, activation=None, shapes=SHAPES, benchmark_shapes=LAYER_SHAPES),
    _case("linear-relu", layers=1, activation="relu"),
    _case("linear-gelu-no_bias", layers=1, activation="gelu", bias=False),
    _case(
        "feed_forward",
        layers=2,
        activation="relu",
        shapes=SHAPES,
        benchmark_shapes=BENCHMARK_SHAPES,
    ),
    _case("feed_forward-relu2", layers=2, activation="relu2"),
    _case("feed_forward-gelu", layers=2, activation="gelu", benchmark_shapes=BENCHMARK_SHAPES[:2]),
    _case("feed_forward-gelu_tanh", layers=2, activation="gelu_tanh", bias=False),
    _case("feed_forward-silu", layers=2, activation="silu"),
    _case("feed_forward-none", layers=2, activation=None),
    _case("feed_forward-dropout", layers=2, activation="relu", dropout_p=0.2),
    _case("feed_forward-gelu-dropout", layers=2, activation="gelu", dropout_p=0.2),
)
