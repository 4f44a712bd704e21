"""The sum of one to three embeddings, its layer normalization and dropout: BERT's input.

    h = tables[0][indices[0]] + tables[1][indices[1]] + tables[2][indices[2]]
    y = dropout((h - mean(h)) * rstd * weight + bias),   rstd = rsqrt(var(h) + eps)

``h`` is rounded to the dtype of the tables after each addition, ``y`` before its dropout, as in
torch. Nothing of the size of ``y`` is saved for the gradient: the backward looks the rows up again.
Devlin et al. 2019, arXiv:1810.04805.

The gradient dh is that of ``ops/layer_norm.py`` for dropout(dy); a table's gradient sums the rows
of dh that share an index.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels._core.registry import define, needs_grad, use_reference
from llmos_kernels.ops._dropout import check_dropout, draw_seed, dropout_reference
from llmos_kernels.ops._norm import (
    autocasts,
    check_norm,
    gradients_of,
    norm_backward_reference,
    normalize,
    rows_of,
)

__all__ = ["embedding_layer_norm", "embedding_layer_norm_reference"]

MAX_TABLES = 3


def _embedding_sum(
    indices: Sequence[Tensor | None],
    tables: Sequence[Tensor | None],
    padding_idx: Sequence[int | None] = (None,) * MAX_TABLES,
) -> Tensor:
    """Return the sum of the looked-up rows, added in order; all but the first pair may be None."""
    pairs = zip(indices, tables, padding_idx, strict=True)
    rows = [F.embedding(i, t, p) for i, t, p in pairs if i is not None and t is not None]
    return sum(rows[1:], start=rows[0])


def _normalize_and_drop(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, p: float
) -> Tensor:
    """Return dropout(layer_norm(h)) by the reference, with a newly drawn seed."""
    seed = draw_seed(h.device) if p else None
    return _drop(normalize(h, weight, bias, h.shape[-1], eps, center=True)[0], p, seed)


def _drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return dropout of ``x`` [..., d], or ``x`` itself without a seed."""
    if not p or seed is None:
        return x
    return dropout_reference(rows_of(x, x.shape[-1]), seed, p).reshape(x.shape)


def _forward_reference(
    index0: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    table0: Tensor,
    table1: Tensor | None,
    table2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    h = _embedding_sum((index0, index1, index2), (table0, table1, table2))
    y, stats = normalize(h, weight, bias, h.shape[-1], eps, center=True)
    return _drop(y, dropout_p, seed).contiguous(), stats


def _forward_fake(
    index0: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    table0: Tensor,
    table1: Tensor | None,
    table2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    d = table0.shape[1]
    rows = index0.numel() if d else 0
    dtype = torch.promote_types(table0.dtype, torch.float32)
    return table0.new_empty((*index0.shape, d)), table0.new_empty((2, rows), dtype=dtype)


def _backward_reference(
    dy: Tensor,
    index0: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    table0: Tensor,
    table1: Tensor | None,
    table2: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _embedding_sum((index0, index1, index2), (table0, table1, table2))
    dh, _, dweight, dbias = norm_backward_reference(
        _drop(dy, dropout_p, seed),
        None,
        h,
        weight,
        stats,
        h.shape[-1],
        True,
        0.0,
        None,
        weight_grad,
        bias_grad,
    )
    return dh, dweight, dbias


def _backward_fake(
    dy: Tensor,
    index0: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    table0: Tensor,
    table1: Tensor | None,
    table2: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d, dtype = dy.shape[-1], stats.dtype if weight is None else weight.dtype
    return (
        dy.new_empty(dy.shape),
        dy.new_empty(d if weight_grad else 0, dtype=dtype),
        dy.new_empty(d if bias_grad else 0, dtype=dtype),
    )


_SOURCES = (
    "Tensor index0, Tensor? index1, Tensor? index2, Tensor table0, Tensor? table1, Tensor? table2"
)


def _table_gradient_reference(dh: Tensor, index: Tensor, rows: int, padding: int) -> Tensor:
    """Return the gradient of a table [rows, d] from dh [..., d]; ``padding`` -1 for none."""
    dh = dh.sum_to_size(*index.shape, dh.shape[-1])
    if index.is_cuda:
        # CUDA indices are not checked. An invalid one has NaN in dh, which must stay in the table.
        index = index.clamp(0, rows - 1)
    return torch.ops.aten.embedding_dense_backward(dh, index, rows, padding, False)


# Indices are contiguous int64. The first has the shape of y without its last dimension; the others
# have that shape or the end of it.
_forward = define(
    f"embedding_layer_norm_forward({_SOURCES}, Tensor? weight, Tensor? bias, float eps,"
    " float dropout_p, Tensor? seed) -> (Tensor y, Tensor stats)",
    reference=_forward_reference,
    fake=_forward_fake,
    triton="norm.embedding:forward",
)
_backward = define(
    f"embedding_layer_norm_backward(Tensor dy, {_SOURCES}, Tensor? weight, Tensor stats,"
    " float dropout_p, Tensor? seed, bool weight_grad, bool bias_grad)"
    " -> (Tensor dh, Tensor dweight, Tensor dbias)",
    reference=_backward_reference,
    fake=_backward_fake,
    triton="norm.embedding:backward",
)
# The indices are those of the forward.
_table_gradient = define(
    "embedding_table_gradient(Tensor dh, Tensor index, SymInt rows, int padding) -> Tensor",
    reference=_table_gradient_reference,
    fake=lambda dh, index, rows, padding: dh.new_empty((rows, dh.shape[-1])),
)


class _EmbeddingNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        padding_idx: tuple[int | None, ...],
        eps: float,
        dropout_p: float,
        seed: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *sources: Tensor | None,
    ) -> Tensor:
        y, stats = _forward(*sources, weight, bias, eps, dropout_p, seed)
        ctx.save_for_backward(seed, weight, bias, stats, *sources)
        ctx.padding_idx, ctx.dropout_p = padding_idx, dropout_p
        ctx.d, ctx.eps, ctx.center = y.shape[-1], eps, True
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seed, weight, bias, stats, *sources = ctx.saved_tensors
        indices, tables = sources[:MAX_TABLES], sources[MAX_TABLES:]
        wanted = ctx.needs_input_grad[4:6]
        if torch.is_grad_enabled():
            h = _embedding_sum(indices, tables, ctx.padding_idx)
            dy = _drop(dy, ctx.dropout_p, seed)
            dh, _, *affine = gradients_of(ctx, dy, None, h, weight, bias, stats, None)
        else:
            dh, *affine = _backward(dy, *sources, weight, stats, ctx.dropout_p, seed, *wanted)
            affine = [
                g.to(p.dtype) if w else None
                for g, p, w in zip(affine, (weight, bias), wanted, strict=True)
            ]
        gradient = _table_gradient_reference if torch.is_grad_enabled() else _table_gradient
        dtables = [
            gradient(dh, i, t.shape[0], -1 if p is None else p) if w else None
            for i, t, p, w in zip(
                indices, tables, ctx.padding_idx, ctx.needs_input_grad[-MAX_TABLES:], strict=True
            )
        ]
        return None, None, None, None, *affine, *(None,) * MAX_TABLES, *dtables


def _check_sources(indices: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    """Raise where number, shapes, dtypes or devices of the indices and tables disagree."""
    if not 1 <= len(indices) == len(tables) <= MAX_TABLES:
        raise ValueError(
            f"expected one to {MAX_TABLES} indices and as many tables,"
            f" got {len(indices)} and {len(tables)}"
        )
    first = tables[0]
    for i, (index, table) in enumerate(zip(indices, tables, strict=True)):
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices[{i}] must be int64 or int32, got {index.dtype}")
        if table.ndim != 2 or table.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"tables[{i}] must be [rows, d] of one d, got {list(table.shape)},"
                f" tables[0] {list(first.shape)}"
            )
        if table.dtype is not first.dtype:
            raise TypeError(f"tables[{i}] must be {first.dtype} as tables[0], got {table.dtype}")
        if index.device != first.device or table.device != first.device:
            other = index.device if index.device != first.device else table.device
            raise ValueError(
                f"indices[{i}] or tables[{i}] is on {other}, tables[0] on {first.device}"
            )


def _check_padding(
    padding_idx: Sequence[int | None] | None, tables: Sequence[Tensor]
) -> list[int | None]:
    """Return the row of each table that gets no gradient, counted from 0, or None."""
    if padding_idx is None:
        return [None] * len(tables)
    if len(padding_idx) != len(tables):
        raise ValueError(f"padding_idx must have {len(tables)} entries, got {list(padding_idx)}")
    for i, (p, table) in enumerate(zip(padding_idx, tables, strict=True)):
        if p is not None and not -len(table) <= p < len(table):
            raise ValueError(f"padding_idx[{i}] must be in a table of {len(table)} rows, got {p}")
    return [
        p if p is None or p >= 0 else p + len(t) for p, t in zip(padding_idx, tables, strict=True)
    ]


def _shape(indices: Sequence[Tensor]) -> torch.Size:
    """Return the shape that the indices broadcast to."""
    shapes = [i.shape for i in indices]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"indices must broadcast to one shape, got {[list(s) for s in shapes]}"
        ) from None


def _repeating(index: Tensor, shape: torch.Size) -> Tensor:
    """Return ``index`` in the end of ``shape`` if the rest of that repeats it, else expanded."""
    unrepeated = index.shape
    while unrepeated and unrepeated[0] == 1:
        unrepeated = unrepeated[1:]
    if unrepeated == shape[len(shape) - len(unrepeated) :]:
        return index.reshape(unrepeated).contiguous()
    return index.expand(shape).contiguous()


def embedding_layer_norm(
    indices: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    padding_idx: Sequence[int | None] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``dropout(layer_norm(sum of tables[i][indices[i]]))``, BERT's embeddings, in one pass.

    Args:
        indices: One to three int64 or int32 tensors that broadcast to one shape [...].
        tables: As many tensors [rows, d] of one dtype: float32, bfloat16 or float16 (float64: the
            reference computes it).
        weight: [d], of the dtype of the tables or float32; or None.
        bias: Like ``weight``, and of its dtype.
        eps: Added to the variance.
        dropout_p: The probability, in [0, 1), that an element is set to 0.
        training: Whether dropout is applied.
        padding_idx: For each table the row that gets no gradient, or None.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        [..., d], of the dtype of the tables. On a GPU, which is not waited for, the row of an index
        that its table does not have is NaN.

    Raises:
        ValueError: Shapes or devices disagree, or ``dropout_p`` is not in [0, 1).
        TypeError: A dtype is not as above.
        IndexError: On the CPU, a table does not have an index.

    Example:
        >>> words, positions = torch.randn(30522, 768), torch.randn(512, 768)
        >>> tokens = torch.randint(30522, (8, 128))
        >>> embedding_layer_norm((tokens, torch.arange(128)), (words, positions)).shape
        torch.Size([8, 128, 768])

    Devlin et al. 2019, arXiv:1810.04805.
    """
    _check_sources(indices, tables)
    check_dropout(dropout_p)
    check_norm(tables[0], tables[0].shape[1:], weight, bias)
    padding = _check_padding(padding_idx, tables)
    p = dropout_p if training else 0.0
    if use_reference(backend, tables[0].dtype):
        return _normalize_and_drop(_embedding_sum(indices, tables, padding), weight, bias, eps, p)
    if autocasts(tables[0]) and tables[0].dtype != torch.float32:
        # The sum keeps the tables' dtype, its normalization is float32, as in torch.
        h = _embedding_sum(indices, tables, padding)
        return _normalize_and_drop(h.float(), weight, bias, eps, p)
    shape = _shape(indices)
    first, *others = (i.long() for i in indices)
    absent = (None,) * (MAX_TABLES - len(tables))
    sources = (
        first.expand(shape).contiguous(),
        *(_repeating(i, shape) for i in others),
        *absent,
        *tables,
        *absent,
    )
    seed = draw_seed(tables[0].device) if p else None
    if not needs_grad(*tables, weight, bias):
        return _forward(*sources, weight, bias, eps, p, seed)[0]
    return _EmbeddingNorm.apply((*padding, *absent), eps, p, seed, weight, bias, *sources)


def embedding_layer_norm_reference(*args: Any, **options: Any) -> Tensor:
    """Return ``embedding_layer_norm`` by its definition, in plain, differentiable torch ops.

    It runs on any device, and in float64 its result is exact.

    Args:
        *args: as ``embedding_layer_norm``, without ``backend``.
        **options: as ``embedding_layer_norm``, without ``backend``.

    Returns:
        [..., d], of the dtype of the tables.
    """
    return embedding_layer_norm(*args, **options, backend="reference")
