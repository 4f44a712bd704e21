"""Root mean square normalization over the last dimensions, and its fusion with a residual.

    h = residual + dropout(x)
    y = h * rstd * weight,   rstd = rsqrt(mean(h^2) + eps)

The reference and the ops are those of ``ops/layer_norm.py`` with ``center=False``. ``rstd`` is
float32 whatever the dtype.  Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmos_kernels._core.registry import use_reference
from llmos_kernels.ops._dropout import check_dropout
from llmos_kernels.ops._norm import (
    add_dropped,
    add_norm,
    as_float32,
    autocasts,
    check_norm,
    check_residual,
    norm,
    normalize,
)

__all__ = ["add_rms_norm", "add_rms_norm_reference", "rms_norm", "rms_norm_reference"]


def rms_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Return ``rms_norm`` by its definition, in plain, differentiable torch ops.

    It runs on any device, and in float64 its result is exact.

    Args:
        input: [..., *normalized_shape], of any floating-point dtype.
        normalized_shape: the last dimensions of ``input``.
        weight: as in ``rms_norm``.
        eps: as in ``rms_norm``.

    Returns:
        A tensor of the shape and dtype of ``input``.
    """
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
    """Return ``add_rms_norm`` by its definition, in plain, differentiable torch ops.

    It runs on any device, and in float64 its result is exact.

    Args:
        input: [..., *normalized_shape], of any floating-point dtype.
        residual: as in ``add_rms_norm``.
        normalized_shape: the last dimensions of ``input``.
        weight: as in ``add_rms_norm``.
        eps: as in ``add_rms_norm``.
        dropout_p: as in ``add_rms_norm``.
        training: as in ``add_rms_norm``.

    Returns:
        ``(y, h)``, both of the shape of ``input``.
    """
    d = check_norm(input, normalized_shape, weight, None)
    h = add_dropped(input, residual, normalized_shape, dropout_p, training)
    return normalize(h, weight, None, d, _eps(eps, h.dtype), center=False)[0], h


def _in_accumulation_dtype(weight: Tensor | None, input: Tensor) -> Tensor | None:
    """Return the weight as kernels take it: of the dtype of ``input``, or float32.

    torch takes a weight of any floating dtype, and multiplies before it rounds.
    """
    if weight is None or weight.dtype == input.dtype:
        return weight
    return weight.to(torch.promote_types(input.dtype, torch.float32))


def _eps(eps: float | None, dtype: torch.dtype) -> float:
    """Return ``eps``, or for None, as torch does, the epsilon of the accumulation dtype."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps if eps is None else eps


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return ``torch.nn.functional.rms_norm`` of the arguments, in one pass over ``input``.

    Args:
        input: [..., *normalized_shape], float32, bfloat16 or float16 (float64: the reference
            computes it), any strides.
        normalized_shape: The last dimensions of ``input``.
        weight: [*normalized_shape], of any floating dtype, or None.
        eps: Added to the mean square; None is the epsilon of float32 (of float64 for float64).
        backend: "reference" for the plain torch definition, else None.

    Returns:
        A contiguous tensor of the shape and dtype of ``input``; float32 under CUDA autocast, as in
        torch.

    Raises:
        ValueError: Shapes or devices disagree.
        TypeError: A dtype is not as above. Both are RuntimeErrors too where torch raises those.

    Example:
        >>> rms_norm(torch.randn(8, 128, 768), (768,)).shape
        torch.Size([8, 128, 768])

    Zhang and Sennrich 2019, arXiv:1910.07467.
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
    """Return ``rms_norm(h)`` and ``h = residual + dropout(input)``, in one pass.

    Args:
        input: [..., *normalized_shape], float32, bfloat16 or float16 (float64: the reference
            computes it), any strides.
        residual: Of the shape of ``input``; where the dtypes differ, both are taken in the common
            one.
        normalized_shape: The last dimensions of ``input``.
        weight: [*normalized_shape], of any floating dtype, or None.
        eps: Added to the mean square; None is the epsilon of float32 (of float64 for float64).
        dropout_p: The probability, in [0, 1), that an element of ``input`` is set to 0.
        training: Whether dropout is applied.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        ``(y, h)``, both of the shape of ``input``. Under CUDA autocast ``y`` is
        float32, as in torch.

    Raises:
        ValueError: Shapes or devices disagree, or ``dropout_p`` is not in [0, 1).
        TypeError: A dtype is not as above.

    Example:
        >>> x = torch.randn(8, 128, 768)
        >>> y, h = add_rms_norm(x, x, (768,))

    Zhang and Sennrich 2019, arXiv:1910.07467.
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
