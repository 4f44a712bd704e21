"""``torch.nn.LayerNorm`` and ``torch.nn.RMSNorm``."""

from typing import Any, ClassVar

import torch
from torch import nn

import llmos_kernels.nn as fused
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.rules.rule import Candidate, Rule, example_rows, tensor_options


class NormRule(Rule):
    """Swaps torch's norms for those of ``llmos_kernels.nn``."""

    classes: ClassVar = {nn.LayerNorm: fused.LayerNorm, nn.RMSNorm: fused.RMSNorm}
    fused = (fused.AddLayerNorm,)

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return one call, with an input of shape [rows, *normalized_shape]."""
        module: Any = candidate.module
        shape = (example_rows(size), *module.normalized_shape)
        return [ModuleCall((torch.randn(*shape, **tensor_options(module)),))]
