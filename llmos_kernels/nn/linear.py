"""Linear layers: torch's, and what stores its weight the other way."""

import functools
import sys

import torch
from torch import Tensor

from llmos_kernels.nn.derived import Derived, derive
from llmos_kernels.nn.hooks import has_hooks
from llmos_kernels.ops.linear import project


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` through ``llmos_kernels.linear`` on CPUs, where that is faster at the size and
    dtype of the call, else through torch's product.
    """

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


class FusedConv1D(Derived):
    """The ``Conv1D`` of transformers, a linear layer whose weight is [in, out]."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight.mT, self.bias)


@functools.cache
def fused_conv1d(replaced: type) -> type:
    """The drop-in subclass of ``replaced``."""
    return derive(FusedConv1D, replaced, (fused_conv1d, (replaced,)))


def is_conv1d(layer: torch.nn.Module) -> bool:
    """Whether ``layer`` is the ``Conv1D`` of transformers, which need not be installed."""
    return type(layer) is getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def linear_parameters(layer: torch.nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """weight [out, in] and bias of a linear layer that a fused forward need not call; else None."""
    if has_hooks(layer):
        return None
    if type(layer) in (torch.nn.Linear, Linear):
        return layer.weight, layer.bias  # type: ignore[return-value]
    if isinstance(layer, FusedConv1D) or is_conv1d(layer):
        return layer.weight.mT, layer.bias  # type: ignore[return-value]
    return None
