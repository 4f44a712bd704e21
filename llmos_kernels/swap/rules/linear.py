"""``torch.nn.Linear``, and the ``Conv1D`` of transformers, whose weight is [in, out]."""

import functools
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import llmos_kernels.nn as fused
from llmos_kernels.nn.fusible import is_fusible
from llmos_kernels.nn.linear import linear_parameters
from llmos_kernels.ops._product_policy import table
from llmos_kernels.ops.linear import project
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.generated_class import GeneratedClass, generate_class
from llmos_kernels.swap.rules.rule import Candidate, Match, Rule, example_rows, tensor_options


class FusedConv1D(GeneratedClass):
    """The ``Conv1D`` of transformers, through our linear layer.

    Args:
        x: [..., in].

    Returns:
        ``x @ weight + bias``, [..., out].
    """

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight.mT, self.bias)


@functools.cache
def fused_conv1d(replaced: type) -> type:
    """Return the drop-in subclass of the class ``replaced``."""
    return generate_class(FusedConv1D, replaced, (fused_conv1d, (replaced,)))


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether ``layer`` is the ``Conv1D`` of transformers, which need not be installed."""
    return type(layer) is getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return weight [out, in] and bias of a linear layer or ``Conv1D`` that need not be called.

    None for other modules and for layers with hooks.
    """
    if isinstance(layer, FusedConv1D) or is_conv1d(layer):
        return (layer.weight.mT, layer.bias) if is_fusible(layer) else None  # type: ignore
    return linear_parameters(layer)


class LinearRule(Rule):
    """Swaps linear layers on CPUs, where our GEMM is faster than torch's at some size.

    The ``out_proj`` of ``nn.MultiheadAttention`` is left alone: it is never called.
    """

    classes: ClassVar = {nn.Linear: fused.Linear}

    def match(self, module: nn.Module) -> Match | None:
        cls: Any = type(module)
        conv1d = is_conv1d(module)
        if not (conv1d or isinstance(module, nn.Linear)) or not _has_faster_gemm(module):
            return None
        return Match(fused_conv1d(cls) if conv1d else fused.Linear)

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return one call, with an input of shape [rows, in], for ``Conv1D`` [1, rows, in]."""
        module, rows = candidate.module, example_rows(size)
        options = tensor_options(module)
        if isinstance(module, nn.Linear):
            return [ModuleCall((torch.randn(rows, module.in_features, **options),))]
        width = len(next(module.parameters()))
        return [ModuleCall((torch.randn(1, rows, width, **options),))]


def _has_faster_gemm(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return (
        weight is not None
        and weight.is_cpu
        and table(weight.dtype, weight.device).may_own_layers
        and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )
