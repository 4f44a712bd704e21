"""A residual block that projects, drops out, adds and normalises, fused over the class it replaces."""

import functools
import inspect
import operator
from typing import Any

import torch
from torch import Tensor

from llmos_kernels.nn.derived import Derived, derive
from llmos_kernels.nn.hooks import has_hooks, is_plain_dropout
from llmos_kernels.nn.norm import LayerNorm
from llmos_kernels.ops.layer_norm import add_layer_norm


class FusedResidual(Derived):
    """``LayerNorm(residual + Dropout(dense(input)))``, mixed into the class it replaces.

    Its parts are found by type: one LayerNorm, one Dropout, one other module. Where they or the
    arguments are no longer what a fused call can take, the replaced class's own forward runs.
    """

    _names: tuple[str, ...]  # Of the two arguments of its forward.

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        parts = residual_parts(self)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        whole = len(args) + len(kwargs) == len(given) == 2 and all(n in given for n in self._names)
        if not whole or parts is None or not _is_plain(*parts[1:]):
            return self._replaced.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        dense, dropout, norm = parts
        input, residual = (given[name] for name in self._names)
        return add_and_norm(dense(input), residual, dropout, norm)[0]


def add_and_norm(input: Tensor, residual: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """``norm(h)`` and ``h = residual + dropout(input)``; in one pass where both are torch's."""
    if not (_is_plain(dropout, norm) and isinstance(residual, Tensor)) or (
        input.shape != residual.shape
    ):
        h = dropout(input) + residual
        return norm(h), h
    return add_layer_norm(
        input,
        residual,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        dropout.p,
        dropout.training,
    )


@functools.cache
def fused_residual(replaced: type) -> type:
    """The drop-in subclass of ``replaced``."""
    names = tuple(_parameters(replaced))
    return derive(FusedResidual, replaced, (fused_residual, (replaced,)), _names=names)


def residual_parts(
    block: torch.nn.Module,
) -> tuple[Any, torch.nn.Dropout, torch.nn.LayerNorm] | None:
    """Its projection, dropout and LayerNorm, or None where it has not just these."""
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
        return None
    return dense[0], dropout[0], norm[0]


def takes_two_tensors(cls: type) -> bool:
    """Whether ``cls.forward`` has two parameters, plain ones without a default."""
    parameters = _parameters(cls).values()
    plain = (p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
    return len(parameters) == 2 and all(plain)


def computes_residual(block: torch.nn.Module) -> bool:
    """Whether the forward of ``block`` is, step by step, the formula that ``FusedResidual`` fuses.

    Numbers alone cannot tell: without dropout many other formulas give the same ones.
    """
    parts = residual_parts(block)
    try:
        nodes = list(_Tracer().trace(block).nodes)
    except Exception:  # A forward that cannot be traced decides something by its input.
        return False
    if parts is None or len(nodes) != 7:
        return False
    a, b, dense, dropout, add, norm, output = nodes
    children = {m: name for name, m in block.named_children()}
    steps = [(dense, parts[0], (a,)), (dropout, parts[1], (dense,)), (norm, parts[2], (add,))]
    added = add.target in (operator.add, operator.iadd, torch.add, "add", "add_")
    return (
        a.op == b.op == "placeholder"
        and all(
            n.op == "call_module" and n.target == children[m] and n.args == args and not n.kwargs
            for n, m, args in steps
        )
        and added
        and not add.kwargs
        and set(add.args) == {dropout, b}
        and output.args == (norm,)
    )


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m, qualified_name) -> bool:
        return True


def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    _, *parameters = inspect.signature(cls.forward).parameters.items()
    return dict(parameters)


def _is_plain(dropout: Any, norm: Any) -> bool:
    plain_norm = type(norm) in (torch.nn.LayerNorm, LayerNorm) and not has_hooks(norm)
    return plain_norm and is_plain_dropout(dropout)
