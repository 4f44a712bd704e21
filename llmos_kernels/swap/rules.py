"""Which modules can be swapped, for what, and why one cannot."""

from typing import Any

import torch
from torch import nn

import llmos_kernels.nn as fused
from llmos_kernels._registry import KERNEL_DTYPES
from llmos_kernels.nn.residual import (
    FusedResidual,
    computes_residual,
    fused_residual,
    has_hooks,
    residual_parts,
    takes_two_tensors,
)
from llmos_kernels.ops.attention_arguments import MAX_DIM

#: A class and its drop-in. Subclasses are others: they may compute something else.
EXACT = {
    nn.LayerNorm: fused.LayerNorm,
    nn.RMSNorm: fused.RMSNorm,
    nn.MultiheadAttention: fused.MultiheadAttention,
    nn.TransformerEncoderLayer: fused.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fused.TransformerDecoderLayer,
}


def is_candidate(module: nn.Module) -> bool:
    """Whether a rule knows ``module``; ``why_not`` says whether it can be swapped."""
    return not is_fused(module) and (isinstance(module, tuple(EXACT)) or _is_residual(module))


def drop_in(module: nn.Module) -> type:
    """The class that replaces the one of the candidate ``module``."""
    for plain, ours in EXACT.items():
        if isinstance(module, plain):
            return ours
    cls: Any = type(module)
    return fused_residual(cls)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is one of ours already."""
    return isinstance(module, (FusedResidual, fused.AddLayerNorm, *EXACT.values()))


def is_swap(module: nn.Module, original: type) -> bool:
    """Whether the class of ``module`` is still the drop-in of ``original``."""
    ours = EXACT.get(original) or fused_residual(original)
    return type(module) is ours


def _is_residual(module: nn.Module) -> bool:
    """A forward of two tensors over a projection, a dropout and a LayerNorm."""
    parts = residual_parts(module)
    own = [*module._parameters.values(), *module._buffers.values()]
    return (
        parts is not None
        and type(parts[1]) is nn.Dropout
        and type(parts[2]) in (nn.LayerNorm, fused.LayerNorm)
        and not own
        and takes_two_tensors(type(module))
    )


def why_not(module: nn.Module, ancestors: list[nn.Module]) -> str:
    """Why ``module`` has to stay, or an empty string."""
    cls = type(module)
    plain = next((p for p in EXACT if isinstance(module, p)), None)
    if plain and cls is not plain:
        return f"{cls.__name__} is a subclass of {plain.__name__} with a forward of its own"
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    why = why_untouchable(module, ancestors)
    if why:
        return why
    known = [m for m in module.modules() if isinstance(m, tuple(EXACT))]
    for p in (p for m in known for p in m.parameters()):
        if p.dtype not in KERNEL_DTYPES:
            return f"no kernel for {p.dtype}"
    if isinstance(module, nn.MultiheadAttention):
        return _why_no_attention(module)
    parts = None if plain else residual_parts(module)
    if parts is not None:
        _, dropout, norm = parts
        if not computes_residual(module):
            return "its forward is not LayerNorm(residual + Dropout(dense(input)))"
        if not 0 <= dropout.p < 1:
            return f"dropout with p={dropout.p}"
        if has_hooks(dropout) or has_hooks(norm):
            return "its dropout or LayerNorm has hooks, which a fused forward would not call"
    return ""


def why_untouchable(module: nn.Module, ancestors: list[nn.Module]) -> str:
    """Why nothing of ``module`` can be swapped, whatever it is, or an empty string."""
    for outer in [*ancestors, module]:
        if type(outer).__name__ == "OptimizedModule" or outer._compiled_call_impl is not None:
            return "it is compiled: optimize before torch.compile"
        if type(outer).__name__ == "FullyShardedDataParallel":
            return "its parameters are sharded by FSDP: optimize before wrapping"
    for name, p in module.named_parameters():
        if type(p.data) is not torch.Tensor:
            return f"{name} is a {type(p.data).__name__}: optimize before sharding or quantizing"
        if p.is_meta:
            return f"{name} is on the meta device"
    return ""


def _why_no_attention(module: nn.MultiheadAttention) -> str:
    if module.head_dim > MAX_DIM:
        return f"no kernel for a head dim of {module.head_dim}, above {MAX_DIM}"
    if not 0 <= module.dropout < 1:
        return f"dropout with p={module.dropout}"
    return ""
