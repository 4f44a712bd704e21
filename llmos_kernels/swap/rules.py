"""Which modules can be swapped, for what, and why one cannot."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

import llmos_kernels.nn as fused
from llmos_kernels._registry import KERNEL_DTYPES
from llmos_kernels.nn.chain import fused_chain
from llmos_kernels.nn.derived import Derived
from llmos_kernels.nn.hooks import has_hooks
from llmos_kernels.nn.linear import fused_conv1d, is_conv1d
from llmos_kernels.nn.norm import fused_rms_norm
from llmos_kernels.nn.residual import (
    computes_residual,
    fused_residual,
    residual_parts,
    takes_two_tensors,
)
from llmos_kernels.ops._attention_arguments import MAX_DIM
from llmos_kernels.ops._product_policy import LAYER, rules
from llmos_kernels.swap.chains import find_steps
from llmos_kernels.swap.norms import rms_norm_eps

#: A class and its drop-in. Subclasses are others: they may compute something else.
EXACT = {
    nn.LayerNorm: fused.LayerNorm,
    nn.Linear: fused.Linear,
    nn.RMSNorm: fused.RMSNorm,
    nn.MultiheadAttention: fused.MultiheadAttention,
    nn.TransformerEncoderLayer: fused.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fused.TransformerDecoderLayer,
}


def is_candidate(module: nn.Module) -> bool:
    """Whether a rule knows ``module``; ``why_not`` says whether it can be swapped."""
    if is_fused(module):
        return False
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return _gains_by_own_product(module)
    return isinstance(module, tuple(EXACT)) or _derived(module) is not None


def drop_in(module: nn.Module) -> type:
    """The class that replaces the one of the candidate ``module``."""
    for plain, ours in EXACT.items():
        if isinstance(module, plain):
            return ours
    derived = _derived(module)
    assert derived is not None
    return derived


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is one of ours already."""
    return isinstance(module, (Derived, fused.AddLayerNorm, *EXACT.values()))


def is_swap(module: nn.Module, original: type) -> bool:
    """Whether the class of ``module`` is still the drop-in of ``original``."""
    own = type(module).__dict__.get("_replaced")
    return type(module) is EXACT.get(original) or own is original


def _derived(module: nn.Module) -> type | None:
    """The class made for ``module``, which is known by what it does."""
    cls: Any = type(module)
    if is_conv1d(module):
        return fused_conv1d(cls)
    if _is_residual(module):
        return fused_residual(cls)
    if eps := rms_norm_eps(module):
        return fused_rms_norm(cls, eps)
    steps = find_steps(module)
    return fused_chain(cls, steps) if steps else None


def _gains_by_own_product(layer: nn.Module) -> bool:
    """Elsewhere torch's products are as fast. That of ``nn.MultiheadAttention`` is never called."""
    weight = layer._parameters.get("weight")
    return (
        weight is not None
        and weight.is_cpu
        and bool(rules(LAYER, weight.dtype, weight.device))
        and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


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
    if isinstance(module, LazyModuleMixin):
        return "it has no shape before it has run: run the model once, then optimize"
    plain = next((p for p in EXACT if isinstance(module, p)), None)
    if plain and cls is not plain:
        return f"{cls.__name__} is a subclass of {plain.__name__} with a forward of its own"
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    why = why_untouchable(module, ancestors)
    if why:
        return why
    known = [m for m in module.modules() if isinstance(m, tuple(EXACT))]
    for p in (p for m in known or [module] for p in m.parameters()):
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
