"""Layer normalization over the last dimensions, and its fusion with a residual and dropout.

    h = residual + dropout(x)
    y = (h - mean(h)) * rstd * weight + bias,   rstd = rsqrt(var(h) + eps)

RMS normalization (``ops/rms_norm.py``) is the same with mean 0 and no bias: ``center=False`` here.
``mean`` and ``rstd`` are float32, for float64 input float64; ``h`` is rounded to that dtype before
it is normalized, as in torch.  Ba et al. 2016, arXiv:1607.06450.

The gradients, with g = dy * weight and x_hat = (h - mean) * rstd:

    dresidual = (g - mean(g) - x_hat * mean(g * x_hat)) * rstd + dh,   dx = dropout(dresidual)
    dweight = sum(dy * x_hat),   dbias = sum(dy)
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
    width_of,
)

__all__ = ["add_layer_norm", "add_layer_norm_reference", "layer_norm", "layer_norm_reference"]


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return ``layer_norm`` by its definition, in plain, differentiable torch ops.

    It runs on any device, and in float64 its result is exact.

    Args:
        input: [..., *normalized_shape], of any floating-point dtype.
        normalized_shape: the last dimensions of ``input``.
        weight: as in ``layer_norm``.
        bias: as in ``layer_norm``.
        eps: as in ``layer_norm``.

    Returns:
        A tensor of the shape and dtype of ``input``.
    """
    return normalize(input, weight, bias, width_of(normalized_shape), eps, center=True)[0]


def add_layer_norm_reference(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``add_layer_norm`` by its definition, in plain, differentiable torch ops.

    It runs on any device, and in float64 its result is exact.

    Args:
        input: [..., *normalized_shape], of any floating-point dtype.
        residual: as in ``add_layer_norm``.
        normalized_shape: the last dimensions of ``input``.
        weight: as in ``add_layer_norm``.
        bias: as in ``add_layer_norm``.
        eps: as in ``add_layer_norm``.
        dropout_p: as in ``add_layer_norm``.
        training: as in ``add_layer_norm``.

    Returns:
        ``(y, h)``, both of the shape of ``input``.
    """
    h = add_dropped(input, residual, normalized_shape, dropout_p, training)
    return normalize(h, weight, bias, width_of(normalized_shape), eps, center=True)[0], h


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return ``torch.nn.functional.layer_norm`` of the arguments.

    Args:
        input: [..., *normalized_shape], float32, bfloat16 or float16 (float64: the reference
            computes it), any strides.
        normalized_shape: The last dimensions of ``input``.
        weight: [*normalized_shape], of the dtype of ``input`` or, for 16-bit input, float32; or
            None.
        bias: Like ``weight``, and of its dtype.
        eps: Added to the variance.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        A contiguous tensor of the shape and dtype of ``input``; float32 under CUDA autocast, as in
        torch.

    Raises:
        ValueError: Shapes or devices disagree.
        TypeError: A dtype is not as above. Both are RuntimeErrors too where torch raises those.

    Example:
        >>> layer_norm(torch.randn(8, 128, 768), (768,)).shape
        torch.Size([8, 128, 768])

    Ba et al. 2016, arXiv:1607.06450.
    """
    if autocasts(input):
        input, weight, bias = as_float32(input, weight, bias)
    d = check_norm(input, normalized_shape, weight, bias)
    if use_reference(backend, input.dtype):
        return layer_norm_reference(input, normalized_shape, weight, bias, eps)
    return norm(input, weight, bias, d, eps, True)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``layer_norm(h)`` and ``h = residual + dropout(input)``, in one pass.

    Args:
        input: [..., *normalized_shape], float32, bfloat16 or float16 (float64: the reference
            computes it), any strides.
        residual: Of the shape of ``input``; where the dtypes differ, both are taken in the common
            one.
        normalized_shape: The last dimensions of ``input``.
        weight: [*normalized_shape], of the dtype of ``h`` or, where that has 16 bits, float32; or
            None.
        bias: Like ``weight``, and of its dtype.
        eps: Added to the variance.
        dropout_p: The probability, in [0, 1), that an element of ``input`` is set to 0.
        training: Whether dropout is applied.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        ``(y, h)``, both of the shape of ``input``. Under CUDA autocast ``y`` is float32, as in
        torch; 16-bit arguments are then added in their dtype, unfused.

    Raises:
        ValueError: Shapes or devices disagree, or ``dropout_p`` is not in [0, 1).
        TypeError: A dtype is not as above.

    Example:
        >>> x = torch.randn(8, 128, 768)
        >>> y, h = add_layer_norm(x, x, (768,), dropout_p=0.1, training=True)

    Ba et al. 2016, arXiv:1607.06450. The dropout mask is that of ``ops/_dropout.py``.
    """
    check_dropout(dropout_p)
    input, residual = check_residual(input, residual)
    if autocasts(input):
        if input.dtype != torch.float32:
            h = add_dropped(input, residual, normalized_shape, dropout_p, training)
            return layer_norm(h, normalized_shape, weight, bias, eps, backend=backend), h
        weight, bias = as_float32(weight, bias)
    d = check_norm(input, normalized_shape, weight, bias)
    if use_reference(backend, input.dtype):
        return add_layer_norm_reference(
            input, residual, normalized_shape, weight, bias, eps, dropout_p, training
        )
    p = dropout_p if training else 0.0
    return add_norm(input, residual, weight, bias, d, eps, True, p)
