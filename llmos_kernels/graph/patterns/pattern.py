"""The base class of patterns, and what several of them ask about their arguments."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from llmos_kernels.graph.reader import Reader
from llmos_kernels.graph.site import Found
from llmos_kernels.graph.vocabulary import Op
from llmos_kernels.nn.fusible import is_plain_dropout
from llmos_kernels.nn.linear import linear_parameters
from llmos_kernels.nn.norm import is_plain_norm


class Pattern(ABC):
    """Something that a fused call can replace.

    Example:
        >>> class Square(Pattern):
        ...     anchors = ("mul",)
        ...
        ...     def find(self, op, reader):
        ...         if op.get("input") is not op.get("other"):
        ...             return None
        ...         args = (op.get("input"),)
        ...         return Found(frozenset((op.node,)), (op.node,), args, Call(), op.node, "square")
    """

    #: The operations at which the search starts.
    anchors: ClassVar[tuple[str, ...]]

    @abstractmethod
    def find(self, op: Op, reader: Reader) -> Found | None:
        """Return the match around an operation that is one of ``anchors``, or None.

        Raises:
            NoMatch: it looks like the pattern, with the reason why it is not replaced.
        """


def dropout_of(op: Op) -> Any:
    """Return the dropout of an operation as an argument of a call: ``ModuleRef``, or (p, on)."""
    if "module" in op.args:
        return op.get("module")
    return op.get("p", 0.5), op.get("training", True)


def probability(dropout: Any) -> float | None:
    """Return the probability with which ``dropout`` drops now; None if that cannot be fused.

    Args:
        dropout: None, a module, or (p, on).
    """
    if dropout is None:
        return 0.0
    p: Any
    if isinstance(dropout, nn.Module):
        if not is_plain_dropout(dropout):
            return None
        p, on = dropout.p, dropout.training
    else:
        p, on = dropout
    if not on:
        return 0.0
    if isinstance(p, torch.SymFloat):
        p = float(p)  # Of a compiled graph with dynamic numbers: it is compiled for this one.
    return p if isinstance(p, (int, float)) and 0 <= p < 1 else None


def linear_of(op: Op) -> Any:
    """Return the linear layer of an operation as an argument: ``ModuleRef``, or (weight, bias)."""
    if "module" in op.args:
        return op.get("module")
    return op.get("weight"), op.get("bias")


def parameters_of(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of what ``linear_of`` names, or None if it has to be called."""
    return linear_parameters(layer) if isinstance(layer, nn.Module) else layer


def norm_of(op: Op) -> Any:
    """Return a layer norm as an argument: ``ModuleRef``, or (shape, weight, bias, eps)."""
    if "module" in op.args:
        return op.get("module")
    shape, eps = op.get("normalized_shape"), op.get("eps", 1e-5)
    return tuple(shape), op.get("weight"), op.get("bias"), eps


def norm_parameters(norm: Any) -> tuple[tuple[int, ...], Any, Any, float] | None:
    """Return shape, weight, bias and epsilon of what ``norm_of`` names; None if it must be called.

    Args:
        norm: a module, or the parameters.
    """
    if not isinstance(norm, nn.Module):
        return norm
    if not is_plain_norm(norm):
        return None
    module: Any = norm
    return module.normalized_shape, module.weight, module.bias, module.eps


def broadcasts(mask: Any, query: Tensor, logits: Sequence[int]) -> bool:
    """Return True if ``mask`` broadcasts to ``logits``, whose shape it leaves as it is.

    Args:
        mask: anything.
        query: a tensor on the device that it has to be on.
        logits: the shape.
    """
    if not isinstance(mask, Tensor) or mask.ndim > len(logits) or mask.device != query.device:
        return False
    pairs = zip(reversed(mask.shape), reversed(logits), strict=False)
    return all(m == 1 or m == n for m, n in pairs)


def is_node(*values: Any) -> bool:
    """Return True if all values are nodes."""
    return all(isinstance(v, Node) for v in values)
