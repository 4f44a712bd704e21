"""Root mean square normalisation over the last dimensions, and its fusion with a residual.

    h = residual + dropout(x)
    y = h * rstd * weight,   rstd = rsqrt(mean(h^2) + eps)

The ops are those of ``ops/layer_norm.py`` without centring.  Zhang and Sennrich 2019,
arXiv:1910.07467.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmos_kernels._registry import use_reference
from llmos_kernels.ops._dropout import check_dropout
from llmos_kernels.ops.layer_norm import (
    add_dropped,
    add_norm,
    as_float32,
    autocasts,
    check_norm,
    check_residual,
    norm,
    normalize,
)


def rms_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """The definition of ``rms_norm``: plain, differentiable, any device and dtype."""
    d = check_norm(input, normalized_shape, weight, None)
    return normalize(input, weight, None, d, _eps(eps, input.dtype), center=False)[0]


def add_rms_norm_reference(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition of ``add_rms_norm``: plain, differentiable, any device and dtype."""
    d = check_norm(input, normalized_shape, weight, None)
    h = add_dropped(input, residual, normalized_shape, dropout_p, training)
    return normalize(h, weight, None, d, _eps(eps, h.dtype), center=False)[0], h


def _in_accumulation_dtype(weight: Tensor | None, input: Tensor) -> Tensor | None:
    # torch lets RMSNorm's weight have any dtype, and multiplies before it rounds.
    if weight is None or weight.dtype == input.dtype:
        return weight
    return weight.to(torch.promote_types(input.dtype, torch.float32))


def _eps(eps: float | None, dtype: torch.dtype) -> float:
    # torch takes the epsilon of the dtype it accumulates in.
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps if eps is None else eps


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.rms_norm`` in one pass over ``input``.

    ``input`` [..., *normalized_shape] may be float32, bfloat16 or float16 (float64: the reference
    answers), with any strides; ``weight`` [*normalized_shape] may have another floating
    dtype. ``eps``
    defaults to the epsilon of float32 (of float64 for float64), as in torch. Raises ValueError for
    shapes or devices that disagree, TypeError for dtypes.  Zhang and Sennrich 2019.
    """
    if autocasts(input):
        input, weight = as_float32(input, weight)
    weight = _in_accumulation_dtype(weight, input)
    d = check_norm(input, normalized_shape, weight, None)
    if use_reference(backend, input.dtype):
        return rms_norm_reference(input, normalized_shape, weight, eps)
    return norm(input, weight, None, d, _eps(eps, input.dtype), False)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = residual + dropout(input)`` and ``rms_norm(h)`` in one pass; returns ``(y, h)``.

    Arguments and errors are those of ``add_layer_norm`` and ``rms_norm``.
    """
    check_dropout(dropout_p)
    input, residual = check_residual(input, residual)
    if autocasts(input):
        if input.dtype != torch.float32:
            h = add_dropped(input, residual, normalized_shape, dropout_p, training)
            return rms_norm(h, normalized_shape, weight, eps, backend=backend), h
        (weight,) = as_float32(weight)
    weight = _in_accumulation_dtype(weight, input)
    d = check_norm(input, normalized_shape, weight, None)
    if use_reference(backend, input.dtype):
        return add_rms_norm_reference(
            input, residual, normalized_shape, weight, eps, dropout_p, training
        )
    p = dropout_p if training else 0.0
    return add_norm(input, residual, weight, None, d, _eps(eps, input.dtype), False, p)
