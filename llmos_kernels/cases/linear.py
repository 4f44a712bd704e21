"""Cases of linear layers and feed-forward blocks. A shape is (*batch, in, out), or (*batch, d_model,
hidden)."""

import functools

import torch
import torch.nn.functional as F

from llmos_kernels.cases.case import Case
from llmos_kernels.ops import _activations, feed_forward, linear
from llmos_kernels.ops._dropout import draw_seed, dropout_reference


def _layer(inner, outer, bias, requires_grad=False, **options):
    bound = max(inner, 1) ** -0.5
    weight = (torch.rand(outer, inner, **options) * 2 - 1) * 1.7 * bound
    biases = (torch.rand(outer, **options) * 2 - 1) * bound if bias else None
    return tuple(t if t is None else t.detach().requires_grad_(requires_grad)
                 for t in (weight, biases))  # fmt: skip


def _make(shape, layers=1, bias=True, **options):
    *batch, inner, outer = shape
    x = torch.randn(*batch, inner, **options)
    first = _layer(inner, outer, bias, **options)
    return x, *first, *(_layer(outer, inner, bias, **options) if layers == 2 else ())


def _eager_linear(activation, x, weight, bias):
    return _activations.activate(F.linear(x, weight, bias), _activations.code_of(activation))


def _eager_block(activation, x, weight1, bias1, weight2, bias2, drop=None):
    h = _eager_linear(activation, x, weight1, bias1)
    return F.linear(drop(h) if drop else h, weight2, bias2)


def _our_dropout(p, h):
    rows = h.reshape(h.shape[:-1].numel(), h.shape[-1])
    return dropout_reference(rows, draw_seed(h.device), p).view(h.shape)


#: Empty, one, primes, powers of two and their neighbours, more than one block of each kind.
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
_FEW = ((3, 65, 40), (2, 17, 40, 130))
#: Training and inference of a base model, a small encoder, and one token of a large decoder.
SIZES = ((1024, 768, 3072), (128, 384, 1536), (1, 4096, 16384))
SIZES_GPU = ((8192, 384, 1536), (8192, 1024, 4096), (8192, 4096, 16384))


def _case(name, *, layers, activation, bias=True, dropout_p=0.0, shapes=_FEW, sizes=()):
    module, op = (feed_forward, "feed_forward") if layers == 2 else (linear, "linear")
    options = {"activation": activation}
    eager = functools.partial(_eager_block if layers == 2 else _eager_linear, activation)
    rival = None
    if dropout_p:
        options |= {"dropout_p": dropout_p, "training": True}
        rival = functools.partial(eager, drop=functools.partial(F.dropout, p=dropout_p))
        eager = functools.partial(eager, drop=functools.partial(_our_dropout, dropout_p))
    return Case(
        name,
        functools.partial(getattr(module, op), **options),
        functools.partial(getattr(module, f"{op}_reference"), **options),
        eager,
        functools.partial(_make, layers=layers, bias=bias),
        shapes,
        sizes,
        SIZES_GPU if sizes else (),
        rival=rival,
        sized=lambda n: (n, 24, 40),
        tiny=(3, 2, 4),
        medium=(67, 96, 129),
        widths=(64, 768, 3072),
        row_wise=False,
    )


LINEAR = (
    _case("linear", layers=1, activation=None, shapes=SHAPES),
    _case("linear-relu", layers=1, activation="relu"),
    _case("linear-gelu-no_bias", layers=1, activation="gelu", bias=False),
    _case("feed_forward", layers=2, activation="relu", shapes=SHAPES, sizes=SIZES),
    _case("feed_forward-relu2", layers=2, activation="relu2"),
    _case("feed_forward-gelu", layers=2, activation="gelu", sizes=SIZES[:2]),
    _case("feed_forward-gelu_tanh", layers=2, activation="gelu_tanh", bias=False),
    _case("feed_forward-silu", layers=2, activation="silu"),
    _case("feed_forward-none", layers=2, activation=None),
    _case("feed_forward-dropout", layers=2, activation="relu", dropout_p=0.2),
    _case("feed_forward-gelu-dropout", layers=2, activation="gelu", dropout_p=0.2),
)
