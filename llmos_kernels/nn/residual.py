"""A residual block that projects, drops out, adds and normalises, fused over the class it replaces."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from llmos_kernels.nn.norm import LayerNorm
from llmos_kernels.ops.layer_norm import add_layer_norm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedResidual(torch.nn.Module):
    """``LayerNorm(residual + Dropout(dense(input)))``, mixed into the class it replaces.

    Its parts are found by type: one LayerNorm, one Dropout, one other module. Where a part has
    been replaced or given a hook since the swap, the replaced class's own forward runs.
    """

    _replaced: type
    _names: tuple[str, ...]  # Of the arguments of its forward.

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        dense, dropout, norm = residual_parts(self)
        if not (_is_plain(dropout, norm) and type(dropout) is torch.nn.Dropout):
            return self._replaced.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        input, residual = (*args, *(kwargs[name] for name in self._names[len(args) :]))
        return add_layer_norm(
            dense(input),
            residual,
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout.p,
            dropout.training,
        )[0]

    def __reduce_ex__(self, protocol):
        # The class is made at run time: pickle and deepcopy find it by the one it replaces.
        return _rebuild, (self._replaced,), self.__dict__.copy()


@functools.cache
def fused_residual(replaced: type) -> type:
    """The drop-in subclass of ``replaced``."""
    members = {"_replaced": replaced, "_names": forward_names(replaced)}
    return type(f"Fused{replaced.__name__}", (FusedResidual, replaced), members)


def residual_parts(block: torch.nn.Module) -> tuple[Any, torch.nn.Dropout, torch.nn.LayerNorm]:
    """Its projection, dropout and LayerNorm; raises ValueError where it has not just these."""
    dense: list[Any] = []
    dropout: list[torch.nn.Dropout] = []
    norm: list[torch.nn.LayerNorm] = []
    for child in block._modules.values():
        if isinstance(child, torch.nn.LayerNorm):
            norm.append(child)
        elif isinstance(child, torch.nn.Dropout):
            dropout.append(child)
        else:
            dense.append(child)
    if not len(dense) == len(dropout) == len(norm) == 1:
        raise ValueError(f"{type(block).__name__} is not a projection, a dropout and a LayerNorm")
    return dense[0], dropout[0], norm[0]


def forward_names(cls: type) -> tuple[str, ...]:
    """The names of the arguments of ``cls.forward``."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


def _is_plain(*modules: torch.nn.Module) -> bool:
    return type(modules[-1]) in (torch.nn.LayerNorm, LayerNorm) and not any(
        getattr(m, hooks) for m in modules for hooks in _HOOKS
    )


def _rebuild(replaced: type) -> torch.nn.Module:
    cls: Any = fused_residual(replaced)
    return cls.__new__(cls)
