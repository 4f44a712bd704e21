"""Residual blocks: ``LayerNorm(residual + Dropout(dense(input)))``, such as ``BertOutput``."""

import functools
import inspect
import operator
from typing import Any

import torch
from torch import Tensor, nn

import llmos_kernels.nn as fused
from llmos_kernels.nn.fusible import is_fusible
from llmos_kernels.nn.norm import add_and_norm, are_plain
from llmos_kernels.swap.calls import ModuleCall, set_training
from llmos_kernels.swap.constants import Constants, constants, have_changed
from llmos_kernels.swap.forwards import side_effect
from llmos_kernels.swap.generated_class import GeneratedClass, generate_class
from llmos_kernels.swap.rules.rule import Candidate, Match, Rule, example_rows, tensor_options


class FusedResidual(GeneratedClass):
    """A block of two tensors, ``LayerNorm(residual + Dropout(dense(input)))``.

    Its parts are found by type: one LayerNorm, one Dropout, one other module. Where the parts, the
    arguments or what it branches by are no longer as they were, the original forward runs.
    """

    #: The names of the two arguments of the original forward: input and residual.
    _argument_names: tuple[str, ...]
    #: What the original forward branches by.
    _constants: Constants

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        parts, names = residual_parts(self), self._argument_names
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        complete = len(args) + len(kwargs) == len(given) == 2 and all(n in given for n in names)
        changed = self._constants and have_changed(self, self._constants)
        if changed or not complete or parts is None or not are_plain(*parts[1:]):
            return self._replaced.forward(self, *args, **kwargs)
        dense, dropout, norm = parts
        input, residual = (given[name] for name in names)
        return add_and_norm(dense(input), residual, dropout, norm)[0]


@functools.cache
def fused_residual(replaced: type, constants: Constants = ()) -> type:
    """Return the drop-in subclass of the class ``replaced``.

    ``constants`` are what its own forward branches by.
    """
    names = tuple(_parameters(replaced))
    made_by = (fused_residual, (replaced, constants))
    members = {"_argument_names": names, "_constants": constants}
    return generate_class(FusedResidual, replaced, made_by, **members)


class ResidualRule(Rule):
    """Swaps modules of two tensors with three children: a Dropout, a LayerNorm and another module.

    torch.fx then shows whether the forward is the formula.
    """

    def match(self, module: nn.Module) -> Match | None:
        parts = residual_parts(module)
        if parts is None or module._parameters or module._buffers:
            return None
        _, dropout, norm = parts
        if type(dropout) is not nn.Dropout or type(norm) not in (nn.LayerNorm, fused.LayerNorm):
            return None
        cls: Any = type(module)
        return Match(fused_residual(cls, constants(module))) if _takes_two_tensors(cls) else None

    def why_not(self, module: Any) -> str:
        parts = residual_parts(module)
        if effect := side_effect(module):
            return f"its forward {effect}"
        if parts is None or not computes_residual(module):
            return "its forward is not LayerNorm(residual + Dropout(dense(input)))"
        _, dropout, norm = parts
        if not 0 <= dropout.p < 1:
            return f"dropout with p={dropout.p}"
        if not is_fusible(dropout) or not is_fusible(norm):
            return "its dropout or LayerNorm has hooks, or a forward or weights of another class"
        return ""

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return one call: input [rows, in_features] and residual [rows, *normalized_shape]."""
        parts = residual_parts(candidate.module)
        if parts is None:
            return super().example_calls(candidate, size)
        dense, _, norm = parts
        if not isinstance(getattr(dense, "in_features", None), int):
            name = type(dense).__name__
            raise ValueError(f"the input width of {name} is unknown: pass inputs=")
        rows, options = example_rows(size), tensor_options(candidate.module)
        shapes = [(dense.in_features,), norm.normalized_shape]
        return [ModuleCall(tuple(torch.randn(rows, *shape, **options) for shape in shapes))]


def residual_parts(block: nn.Module) -> tuple[Any, nn.Dropout, nn.LayerNorm] | None:
    """Return the other child, the Dropout and the LayerNorm of ``block``; None if it has others."""
    dense: list[Any] = []
    dropout: list[nn.Dropout] = []
    norm: list[nn.LayerNorm] = []
    for child in block._modules.values():
        if isinstance(child, nn.LayerNorm):
            norm.append(child)
        elif isinstance(child, nn.Dropout):
            dropout.append(child)
        else:
            dense.append(child)
    if not len(dense) == len(dropout) == len(norm) == 1:
        return None
    return dense[0], dropout[0], norm[0]


def computes_residual(block: nn.Module) -> bool:
    """Return whether the forward of ``block`` is, step by step, the formula of ``FusedResidual``.

    Comparing outputs cannot show it: where dropout is off, its place has no effect.
    """
    modes = {m: m.training for m in block.modules()}
    try:
        for training in (False, True):
            set_training(block, training)
            if not _is_formula(block, list(_ChildrenAreLeaves().trace(block).nodes)):
                return False
    except Exception:  # torch.fx cannot trace it: its forward may branch on its input.
        return False
    finally:
        for module, training in modes.items():
            vars(module)["training"] = training
    return True


def _is_formula(block: nn.Module, nodes: list[torch.fx.Node]) -> bool:
    """Return whether ``nodes``, of a trace of ``block``, are the formula of ``FusedResidual``."""
    parts = residual_parts(block)
    if parts is None or len(nodes) != 7:
        return False
    input, residual, dense, dropout, add, norm, output = nodes
    names = {m: name for name, m in block.named_children()}
    calls = [(dense, parts[0], (input,)), (dropout, parts[1], (dense,)), (norm, parts[2], (add,))]
    return (
        input.op == residual.op == "placeholder"
        and all(
            n.op == "call_module" and n.target == names[m] and n.args == args and not n.kwargs
            for n, m, args in calls
        )
        and add.target in (operator.add, operator.iadd, torch.add, "add", "add_")
        and not add.kwargs
        and set(add.args) == {dropout, residual}
        and output.args == (norm,)
    )


class _ChildrenAreLeaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _takes_two_tensors(cls: type) -> bool:
    """Return whether ``cls.forward`` has exactly two parameters, both without a default."""
    parameters = _parameters(cls).values()
    plain = (p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
    return len(parameters) == 2 and all(plain)


def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of ``cls.forward`` without ``self``, by name."""
    _, *parameters = inspect.signature(cls.forward).parameters.items()
    return dict(parameters)
