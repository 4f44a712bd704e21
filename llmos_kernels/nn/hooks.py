"""What hangs on a module besides its forward."""

import torch

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a fused forward that does not call ``module`` would leave out a hook of it."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def is_plain_dropout(dropout: object) -> bool:
    """Whether a fused dropout can stand for this module."""
    return type(dropout) is torch.nn.Dropout and dropout.p < 1 and not has_hooks(dropout)
