"""Modules whose weights are kept packed for inference, until they are trained."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.ops._weight_panels import WeightPanels

#: The copies of each frozen module. Not an attribute: copies, pickles and state dicts of the module
#: are as without them.
_FROZEN: weakref.WeakKeyDictionary[Any, WeightPanels] = weakref.WeakKeyDictionary()


class Freezable:
    """Mixed into drop-ins that can read packed copies of their weights; ``train()`` drops them."""

    training: bool

    def weights_to_freeze(self) -> Sequence[Tensor]:
        """Return the weights whose copies the module reads, always in the same order.

        Empty if it would not read copies, as its parts are not what the op takes.
        """
        raise NotImplementedError

    def is_one_op(self, src: Tensor) -> bool:
        """Return whether one op computes ``src`` [batch, length, d]; nothing else is run."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        if mode:
            thaw(self)
        return super().train(mode)  # type: ignore[misc]


def freeze(module: Freezable) -> list[Tensor]:
    """Pack the weights of ``module`` and return the copies; none where it would not read them."""
    weights = [] if module.training else module.weights_to_freeze()
    fit = (w.is_cpu and w.dtype in KERNEL_DTYPES and not w.is_inference() for w in weights)
    if not weights or not all(fit) or not _is_one_op(module, weights[0]):
        return []
    _watch_optimizers()
    panels = _FROZEN.setdefault(module, WeightPanels())
    return panels.of(weights)


@torch.no_grad()
def _is_one_op(module: Freezable, weight: Tensor) -> bool:
    """Return whether ``module`` runs as one op, which reads the copies, for any of some lengths."""
    lengths = 1, 16, 128
    return any(module.is_one_op(weight.new_zeros(1, n, weight.shape[-1])) for n in lengths)


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Drop the copies of weights that a fused optimizer wrote, as it changes no version."""
    if not any(group.get("fused") for group in optimizer.param_groups):
        return
    written = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    for panels in _FROZEN.values():
        panels.drop(written)


def thaw(module: Any) -> None:
    """Drop the copies of the weights of ``module``, if there are any."""
    _FROZEN.pop(module, None)


def panels_of(module: Freezable) -> WeightPanels | None:
    """Return the copies of the weights of ``module``; None unless it is frozen."""
    return _FROZEN.get(module)
