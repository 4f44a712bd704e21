"""Normalization modules, alone and with the residual addition before them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmos_kernels.nn.fusible import is_fusible, is_plain_dropout
from llmos_kernels.ops._dropout import check_dropout
from llmos_kernels.ops.layer_norm import add_layer_norm, layer_norm
from llmos_kernels.ops.linear import PLAIN_TENSORS
from llmos_kernels.ops.rms_norm import rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` through ``llmos_kernels.layer_norm``.

    The state dict is that of ``torch.nn.LayerNorm``. Nested tensors, and inputs or weights of
    subclasses of Tensor, such as DTensor, go to torch.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in torch.

    Returns:
        ``forward(input)`` takes [..., *normalized_shape], float32, bfloat16, float16 or float64,
        and returns a tensor of that shape and dtype; float32 under CUDA autocast, as in torch.

    Raises:
        ValueError: ``input`` does not end in ``normalized_shape``, or is on another device than the
            parameters.
        TypeError: ``input`` has another dtype, or the parameters neither its dtype nor, for 16-bit
            input, float32.

    Example:
        >>> LayerNorm(768)(torch.randn(8, 128, 768)).shape
        torch.Size([8, 128, 768])

    Source: Ba et al. 2016, arXiv:1607.06450.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            input.is_nested
            or type(input) not in PLAIN_TENSORS
            or (weight is not None and type(weight) not in PLAIN_TENSORS)
        ):
            return super().forward(input)
        return layer_norm(input, self.normalized_shape, weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` through ``llmos_kernels.rms_norm``.

    The state dict is that of ``torch.nn.RMSNorm``. Nested tensors, and inputs or weights of
    subclasses of Tensor, such as DTensor, go to torch.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in torch.

    Returns:
        ``forward(x)`` takes [..., *normalized_shape], float32, bfloat16, float16 or float64, and
        returns a tensor of that shape and dtype; float32 under CUDA autocast, as in torch.

    Raises:
        ValueError: ``x`` does not end in ``normalized_shape``, or is on another device than the
            weight.
        TypeError: ``x`` has another dtype.

    Example:
        >>> RMSNorm(768)(torch.randn(8, 128, 768)).shape
        torch.Size([8, 128, 768])

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (
            x.is_nested
            or type(x) not in PLAIN_TENSORS
            or (weight is not None and type(weight) not in PLAIN_TENSORS)
        ):
            return super().forward(x)
        return rms_norm(x, self.normalized_shape, weight, self.eps)


class AddLayerNorm(torch.nn.LayerNorm):
    """``h = residual + dropout(input)`` and ``y = LayerNorm(h)`` in one pass.

    A post-norm block uses ``y`` alone, a pre-norm block also passes ``h`` on. The state dict is
    that of ``torch.nn.LayerNorm``.

    Args:
        normalized_shape: the sizes of the last dimensions, which are normalized.
        eps: is added to the variance.
        elementwise_affine: whether there are a weight and a bias.
        bias: whether there is a bias.
        dropout: the probability of dropping an element of ``input`` in training.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        ``forward(input, residual)``, both [..., *normalized_shape], returns ``(y, h)`` of that
        shape.

    Raises:
        ValueError: ``dropout`` is outside [0, 1).

    Example:
        >>> x = torch.randn(8, 128, 768)
        >>> y, h = AddLayerNorm(768, dropout=0.1)(x, residual=x)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dropout(dropout)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = dropout

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        return add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            self.dropout,
            self.training,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


def add_and_norm(input: Tensor, residual: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return ``norm(h)`` and ``h = residual + dropout(input)``.

    Both are computed in one pass where ``are_plain(dropout, norm)`` holds.

    Args:
        input: [..., d].
        residual: [..., d].
        dropout: a module that drops.
        norm: a module that normalizes.
    """
    fits = (
        are_plain(dropout, norm)
        and type(input) in PLAIN_TENSORS
        and type(residual) in PLAIN_TENSORS
        and not (input.is_nested or residual.is_nested)
        and input.shape == residual.shape
    )
    if not fits:
        h = dropout(input) + residual
        return norm(h), h
    return add_layer_norm(
        input,
        residual,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        dropout.p,
        dropout.training,
    )


def are_plain(dropout: object, norm: Any) -> bool:
    """Return whether both are torch's Dropout and LayerNorm, without hooks."""
    return is_plain_norm(norm) and is_plain_dropout(dropout)


def is_plain_norm(norm: Any) -> bool:
    """Return whether ``norm`` is torch's LayerNorm or ours, without hooks."""
    is_layer_norm = type(norm) is torch.nn.LayerNorm or type(norm) is LayerNorm
    return is_layer_norm and is_fusible(norm)
