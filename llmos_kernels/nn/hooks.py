"""Checks that a fused computation, which does not call a module, leaves nothing out."""

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: torch.nn.Module) -> bool:
    """Return whether ``module`` has a hook, which a fused computation would not call."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def is_plain_dropout(dropout: object) -> bool:
    """Return whether a fused dropout computes what the module ``dropout`` does."""
    return type(dropout) is torch.nn.Dropout and dropout.p < 1 and not has_hooks(dropout)
