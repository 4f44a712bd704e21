"""Cases of a sum of embeddings followed by LayerNorm. A shape is (*batch, length, d)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels.ops import embedding
from llmos_kernels.ops._dropout import draw_seed, dropout_reference
from llmos_kernels.testing.cases.case import Case

#: Rows of the word and type tables, and the index of padding.
_WORDS, _TYPES, _PADDING = 29, 2, 0


def _make(
    shape: tuple[int, ...], tables: int = 3, parameters: int = 2, **options: Any
) -> tuple[Tensor, ...]:
    """Return the word, position and type tables, weight and bias, then the indices of each table.

    Only the first ``tables`` and the first ``parameters`` of these are returned.
    """
    *batch, length, d = shape
    device = options.get("device")
    rows = (_WORDS, length + 2, _TYPES)[:tables]
    values = [torch.randn(n, d, **options) for n in rows]
    affine = (torch.rand(d, **options) + 0.5, torch.randn(d, **options) * 0.1)[:parameters]
    values += [p.detach().requires_grad_(options.get("requires_grad", False)) for p in affine]
    words = torch.randint(1, _WORDS, (*batch, length), device=device)
    if length > 3:  # Not in gradcheck: the gradient of padding is 0 by definition, not numerically.
        words[..., -1] = _PADDING
    positions = torch.arange(2, length + 2, device=device).expand(1, length)
    types = torch.randint(_TYPES, (*batch, length), device=device, dtype=torch.int32)
    indices = words, positions, types
    return *values, *indices[:tables]


def _call(
    fn: Callable, tables: int, parameters: int, dropout_p: float, *args: Tensor, **options: Any
) -> Tensor:
    """Call ``fn`` with the arguments that ``_make`` returned."""
    affine = (*args[tables : tables + parameters], None, None)[:2]
    padding = (_PADDING, *(None,) * (tables - 1))
    return fn(
        args[tables + parameters :],
        args[:tables],
        *affine,
        dropout_p=dropout_p,
        training=bool(dropout_p),
        padding_idx=padding,
        **options,
    )


def _eager(
    indices: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    training: bool,
    padding_idx: Sequence[int | None],
    dropout: Callable[[Tensor, float], Tensor] | None = None,
) -> Tensor:
    """Return the result by torch's ops; ``dropout`` replaces the mask that our kernels draw."""
    first, *others = (F.embedding(*each) for each in zip(indices, tables, padding_idx, strict=True))
    for rows in others:
        first = first + rows
    y = F.layer_norm(first, first.shape[-1:], weight, bias)
    if not dropout_p:
        return y
    if dropout is not None:
        return dropout(y, dropout_p)
    return dropout_reference(y.flatten(0, -2), draw_seed(y.device), dropout_p).view(y.shape)


def _case(
    name: str,
    *,
    shapes: tuple,
    tables: int = 3,
    parameters: int = 2,
    dropout_p: float = 0.0,
    benchmark_shapes: tuple = (),
    gpu_benchmark_shapes: tuple = (),
) -> Case:
    """Return the case of that many tables, and of LayerNorm with that many parameters."""

    def of(fn: Callable) -> Callable:
        return functools.partial(_call, fn, tables, parameters, dropout_p)

    return Case(
        f"embedding{name}",
        of(embedding.embedding_layer_norm),
        of(embedding.embedding_layer_norm_reference),
        of(_eager),
        functools.partial(_make, tables=tables, parameters=parameters),
        shapes,
        benchmark_shapes,
        gpu_benchmark_shapes,
        of(functools.partial(_eager, dropout=F.dropout)) if dropout_p else None,
        small_shape=lambda n: (n, 3, 40),
        gradcheck_shape=(2, 3, 5),
        multi_block_shape=(5, 13, 129),
        row_wise=False,
    )


#: Empty, one element, primes, powers of two and their neighbours, wider than a block.
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
_VARIANT_SHAPES = ((2, 3, 129), (2, 65, 31), (2, 20011))

EMBEDDING = (
    _case(
        "",
        shapes=SHAPES,
        benchmark_shapes=((8, 128, 768), (32, 64, 384)),
        gpu_benchmark_shapes=((32, 512, 768), (16, 512, 1024)),
    ),
    _case(
        "-dropout",
        dropout_p=0.1,
        shapes=_VARIANT_SHAPES,
        benchmark_shapes=((8, 128, 768),),
        gpu_benchmark_shapes=((32, 512, 768),),
    ),
    _case("-two_tables", tables=2, parameters=1, shapes=_VARIANT_SHAPES),
    _case("-one_table-plain", tables=1, parameters=0, shapes=_VARIANT_SHAPES),
)
