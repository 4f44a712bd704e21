"""A module that calls its children one after the other, with its feed-forward parts fused."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmos_kernels.nn.derived import Derived, derive
from llmos_kernels.nn.feed_forward import activation_name
from llmos_kernels.nn.hooks import has_hooks, is_plain_dropout
from llmos_kernels.nn.int8 import activated
from llmos_kernels.nn.linear import linear_parameters
from llmos_kernels.ops.feed_forward import feed_forward
from llmos_kernels.ops.linear import linear


class Step(NamedTuple):
    """Children called in turn: linear and activation, or these, perhaps a dropout, and linear; or
    any one child, without ``activation``.

    ``activation`` is the name that ``feed_forward`` has for children of ``activation_type``.
    """

    children: tuple[str, ...]
    activation: str | None = None
    activation_type: type | None = None

    def on(self, modules: dict[str, nn.Module], x: Tensor) -> Tensor:
        """What the children make of ``x``: fused, as long as they are what they were."""
        children = [modules[name] for name in self.children]
        fused = None if self.activation is None else self._fused(children, x)
        if fused is not None:
            return fused
        for child in children:
            x = child(x)
        return x

    def _fused(self, children: list[nn.Module], x: Tensor) -> Tensor | None:
        first, activation, *others = children
        name = self._name_of(activation)
        hidden = activated(first, x, name) if name else None
        if hidden is not None:
            for child in others:
                hidden = child(hidden)
            return hidden
        weights = linear_parameters(first)
        if name is None or weights is None:
            return None
        if not others:
            return linear(x, *weights, name)
        second = linear_parameters(others[-1])
        dropout: Any = others[0] if len(others) == 2 else None
        if second is None or not (dropout is None or is_plain_dropout(dropout)):
            return None
        dropped = (dropout.p, dropout.training) if dropout else ()
        return feed_forward(x, *weights, *second, name, *dropped)

    def _name_of(self, activation: nn.Module) -> str | None:
        known = activation_name(activation)
        if known is None and type(activation) is self.activation_type:
            return None if any(map(has_hooks, activation.modules())) else self.activation
        return known


class FusedChain(Derived):
    """The steps of the class that it replaces. What is no single tensor goes to its own forward."""

    _steps: tuple[Step, ...]

    def forward(self, *args, **kwargs):
        given = (*args, *kwargs.values())
        if len(given) != 1 or not isinstance(given[0], torch.Tensor):
            return self._replaced.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        (x,) = given
        for step in self._steps:
            x = step.on(self._modules, x)  # type: ignore[arg-type]
        return x


@functools.cache
def fused_chain(replaced: type, steps: tuple[Step, ...]) -> type:
    """The drop-in subclass of ``replaced`` whose forward is ``steps``."""
    return derive(FusedChain, replaced, (fused_chain, (replaced, steps)), _steps=steps)
