"""Exported programs that run without Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


def native_decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Return decompositions of the ops that ask something in Python when they run, into kernels.

    Which products are torch's is decided in Python, by what was measured on the machine. A program
    that is to run without Python, as a package of AOTInductor, has the kernels instead.

    Returns:
        A table for ``torch.export.ExportedProgram.run_decompositions``.

    Example:
        >>> layer = llmos_kernels.nn.Linear(8, 8)
        >>> program = torch.export.export(layer, (torch.randn(4, 8),))
        >>> program = program.run_decompositions(llmos_kernels.native_decompositions())
        >>> [n.target.name() for n in program.graph.nodes if "llmos" in str(n.target)]
        ['llmos::linear_forward']
    """
    ops: Any = torch.ops.llmos

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return ops.linear_forward(*args[:-1])

    def dinput(*args: Any) -> tuple[Tensor, Tensor]:
        return ops.linear_dinput(*args[:-1])

    def dweight(*args: Any) -> tuple[Tensor, Tensor]:
        return ops.linear_dweight(*args[:-1])

    def weight_only(*args: Any) -> Tensor:
        return ops.int8_weight_only(*args)

    return {
        ops.linear_forward_by_policy.default: forward,
        ops.linear_dinput_by_policy.default: dinput,
        ops.linear_dweight_by_policy.default: dweight,
        ops.int8_weight_only_of_any_rows.default: weight_only,
    }
