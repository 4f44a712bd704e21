"""The linear layer."""

import torch
from torch import Tensor

from llmos_kernels.nn.fusible import is_fusible
from llmos_kernels.ops.linear import project


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` through our GEMM or torch's, whichever is faster.

    On CPUs the choice depends on the size and dtype of the call; elsewhere it is torch's GEMM. The
    state dict is that of ``torch.nn.Linear``.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.

    Returns:
        ``forward(input)`` takes [..., in_features] and returns [..., out_features], both of the
        dtype of the weight. Under autocast ``input`` is cast, and the result has autocast's dtype.

    Raises:
        RuntimeError: shapes or dtypes disagree. Where our GEMM computes the call, the error is a
            ValueError or a TypeError as well.

    Example:
        >>> Linear(512, 2048)(torch.randn(8, 128, 512)).shape
        torch.Size([8, 128, 2048])
    """

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


def linear_parameters(layer: torch.nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return weight [out, in] and bias of a linear layer that a fused computation need not call.

    None for modules of other classes and for layers with hooks.
    """
    if not is_fusible(layer) or type(layer) not in (torch.nn.Linear, Linear):
        return None
    return layer.weight, layer.bias  # type: ignore[return-value]
