"""Cases of the embedding sum with its normalisation. A shape is (*batch, length, d)."""

import functools

import torch
import torch.nn.functional as F

from llmos_kernels.cases.case import Case
from llmos_kernels.ops import embedding
from llmos_kernels.ops._dropout import draw_seed, dropout_reference

_WORDS, _TYPES, _PADDING = 29, 2, 0


def _make(shape, tables=3, parameters=2, **options):
    """Tables of words, positions and types, weight, bias; then the indices of each table."""
    *batch, length, d = shape
    device = options.get("device")
    rows = (_WORDS, length + 2, _TYPES)[:tables]
    values = [torch.randn(n, d, **options) for n in rows]
    affine = (torch.rand(d, **options) + 0.5, torch.randn(d, **options) * 0.1)[:parameters]
    values += [p.detach().requires_grad_(options.get("requires_grad", False)) for p in affine]
    words = torch.randint(1, _WORDS, (*batch, length), device=device)
    if length > 3:  # The gradient of padding is 0 by definition: a numerical one is not.
        words[..., -1] = _PADDING
    positions = torch.arange(2, length + 2, device=device).expand(1, length)
    types = torch.randint(_TYPES, (*batch, length), device=device, dtype=torch.int32)
    indices = words, positions, types
    return *values, *indices[:tables]


def _call(fn, tables, parameters, dropout_p, *args, **more):
    affine = (*args[tables : tables + parameters], None, None)[:2]
    padding = (_PADDING, *(None,) * (tables - 1))
    return fn(
        args[tables + parameters :], args[:tables], *affine, dropout_p=dropout_p,
        training=bool(dropout_p), padding_idx=padding, **more,
    )  # fmt: skip


def _eager(indices, tables, weight, bias, dropout_p, training, padding_idx, drop=None):
    first, *others = (F.embedding(*each) for each in zip(indices, tables, padding_idx, strict=True))
    for rows in others:
        first = first + rows
    y = F.layer_norm(first, first.shape[-1:], weight, bias)
    if not dropout_p:
        return y
    if drop is not None:
        return drop(y, dropout_p)
    return dropout_reference(y.flatten(0, -2), draw_seed(y.device), dropout_p).view(y.shape)


def _case(name, *, tables=3, parameters=2, dropout_p=0.0, shapes, sizes=(), gpu_sizes=()):
    def of(fn):
        return functools.partial(_call, fn, tables, parameters, dropout_p)

    return Case(
        f"embedding{name}",
        of(embedding.embedding_layer_norm),
        of(embedding.embedding_layer_norm_reference),
        of(_eager),
        functools.partial(_make, tables=tables, parameters=parameters),
        shapes,
        sizes,
        gpu_sizes,
        rival=of(functools.partial(_eager, drop=F.dropout)) if dropout_p else None,
        sized=lambda n: (n, 3, 40),
        tiny=(2, 3, 5),
        medium=(5, 13, 129),
        row_wise=False,
    )


#: Empty, one, primes, powers of two and their neighbours, wider than a block.
SHAPES = (
    (0, 3, 8),
    (2, 3, 0),
    (1, 1),
    (7, 31),
    (2, 3, 129),
    (3, 2, 5, 64),
    (2, 17, 257),
    (70, 1000),
    (2, 20011),
)
_FEW = ((2, 3, 129), (2, 65, 31), (2, 20011))

EMBEDDING = (
    _case(
        "",
        shapes=SHAPES,
        sizes=((8, 128, 768), (32, 64, 384)),
        gpu_sizes=((32, 512, 768), (16, 512, 1024)),
    ),
    _case(
        "-dropout",
        dropout_p=0.1,
        shapes=_FEW,
        sizes=((8, 128, 768),),
        gpu_sizes=((32, 512, 768),),
    ),
    _case("-two_tables", tables=2, parameters=1, shapes=_FEW),
    _case("-one_table-plain", tables=1, parameters=0, shapes=_FEW),
)
