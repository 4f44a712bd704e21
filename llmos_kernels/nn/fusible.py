"""Whether a fused computation may take the place of calling a module.

It may not where a call does more than the class and the tensors of the module say: where hooks
run, where ``forward`` was replaced on the instance, as accelerate's offloading does, or where a
parameter is of a class of its own, quantized or sharded, that brings its own products.
"""

import torch
from torch.nn.modules import module as torch_module

from llmos_kernels.ops.linear import PLAIN_TENSORS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: The hooks of all modules, see ``torch.nn.modules.module.register_module_forward_hook``.
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)


def is_fusible(module: torch.nn.Module) -> bool:
    """Return whether computing what the class of ``module`` computes replaces calling it."""
    if any(_GLOBAL_HOOKS) or any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    if "forward" in module.__dict__:
        return False
    return all(p is None or type(p) in PLAIN_TENSORS for p in module._parameters.values())


def is_plain_dropout(dropout: object) -> bool:
    """Return whether a fused dropout computes what the module ``dropout`` does."""
    return type(dropout) is torch.nn.Dropout and dropout.p < 1 and is_fusible(dropout)
