"""Normalisation modules."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from llmos_kernels.nn.derived import Derived, derive
from llmos_kernels.ops._dropout import check_dropout
from llmos_kernels.ops.layer_norm import add_layer_norm, layer_norm
from llmos_kernels.ops.rms_norm import rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` through ``llmos_kernels.layer_norm``."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return super().forward(input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` through ``llmos_kernels.rms_norm``."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_nested:
            return super().forward(x)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class FusedRMSNorm(Derived):
    """The RMS normalisation of a model of its own kind: a ``weight``, and an epsilon somewhere."""

    weight: Tensor
    _eps: str  # The name of the attribute.

    def forward(self, *args, **kwargs):
        given, weight = (*args, *kwargs.values()), self.weight
        if len(given) == 1 and isinstance(given[0], Tensor) and given[0].dtype == weight.dtype:
            (x,) = given
            if x.dtype == torch.float32 or not torch.is_autocast_enabled(x.device.type):
                return rms_norm(x, weight.shape, weight, getattr(self, self._eps))
        # Each has its own way to mix dtypes.
        return self._replaced.forward(self, *args, **kwargs)  # type: ignore[attr-defined]


@functools.cache
def fused_rms_norm(replaced: type, eps: str) -> type:
    """The drop-in subclass of ``replaced``, whose epsilon is its attribute ``eps``."""
    return derive(FusedRMSNorm, replaced, (fused_rms_norm, (replaced, eps)), _eps=eps)


class AddLayerNorm(torch.nn.LayerNorm):
    """``h = residual + dropout(input)`` and ``LayerNorm(h)`` in one pass; returns ``(y, h)``.

    Post-norm blocks use ``y`` alone, pre-norm blocks carry ``h`` on. The state dict is that of
    ``torch.nn.LayerNorm``. Raises ValueError for a ``dropout`` outside [0, 1).
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        check_dropout(dropout)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = dropout

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
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
