"""Predicates that tell if a fused computation may take the place of calling a module.

It may not where a call does more than the class and the tensors of the module say: where hooks
run, where ``forward`` was replaced on the instance, as accelerate's offloading does, or where a
parameter is of a class of its own, quantized or sharded, that brings its own products.
"""

import torch
from torch.nn.modules import module as torch_module

from llmos_kernels.ops.linear import PLAIN_TENSORS

_PLAIN_PARAMETERS = PLAIN_TENSORS | {type(None)}


def is_fusible(module: torch.nn.Module, ignore_forward_hooks: bool = False) -> bool:
    """Return True if a fused computation may replace calling ``module``.

    Args:
        module: the module.
        ignore_forward_hooks: whether its own forward hooks are known to do nothing now.
    """
    # Every fused call asks this for each of its parts, so it is written out.
    state = module.__dict__
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or (state["_forward_hooks"] and not ignore_forward_hooks)
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    ):
        return False
    return _PLAIN_PARAMETERS.issuperset(map(type, state["_parameters"].values()))


def is_plain_dropout(dropout: object) -> bool:
    """Return True if a fused dropout computes what the module ``dropout`` does."""
    return type(dropout) is torch.nn.Dropout and dropout.p < 1 and is_fusible(dropout)


def drops_nothing(dropout: object) -> bool:
    """Return True if the module ``dropout`` returns its input, and need not be called."""
    is_off = type(dropout) is torch.nn.Dropout and (not dropout.training or dropout.p == 0)
    return is_off and is_fusible(dropout)  # type: ignore[arg-type]
