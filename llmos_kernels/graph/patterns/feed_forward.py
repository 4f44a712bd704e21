"""Two linear layers with an activation between them, and a linear layer with its activation."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llmos_kernels.graph.patterns.pattern import (
    Pattern,
    dropout_of,
    linear_of,
    parameters_of,
    probability,
)
from llmos_kernels.graph.reader import Reader
from llmos_kernels.graph.site import Call, Found, are_plain
from llmos_kernels.graph.vocabulary import Op
from llmos_kernels.ops.feed_forward import feed_forward
from llmos_kernels.ops.linear import linear


@dataclass(frozen=True)
class FeedForwardCall(Call):
    """``linear2(dropout(activation(linear1(x))))``."""

    activation: str

    def fits(self, x: Tensor, first: Any, second: Any, dropout: Any) -> bool:
        weights = parameters_of(first), parameters_of(second)
        if None in weights or probability(dropout) is None:
            return False
        (w1, b1), (w2, b2) = weights  # type: ignore[misc]
        return are_plain(x, *(t for t in (w1, b1, w2, b2) if t is not None)) and w1.ndim == 2

    def __call__(self, x: Tensor, first: Any, second: Any, dropout: Any) -> Tensor:
        (w1, b1), (w2, b2) = parameters_of(first), parameters_of(second)  # type: ignore[misc]
        p = probability(dropout)
        return feed_forward(x, w1, b1, w2, b2, self.activation, p or 0.0, bool(p))


class FeedForward(Pattern):
    """Linear layer, activation, perhaps dropout, linear layer."""

    anchors: ClassVar = ("linear",)

    def find(self, op: Op, reader: Reader) -> Found | None:
        hidden, dropout, nodes = op.get("input"), None, [op.node]
        if dropped := reader.op(hidden, "dropout"):
            hidden, dropout = dropped.get("input"), dropout_of(dropped)
            nodes.append(dropped.node)
        activation = reader.op(hidden, "activation")
        first = activation and reader.op(activation.get("input"), "linear")
        if not activation or not first:
            return None
        nodes += [activation.node, first.node]
        args = first.get("input"), linear_of(first), linear_of(op), dropout
        call = FeedForwardCall(activation.get("name"))
        shown = f"feed-forward: {activation.get('name')}"
        return Found(frozenset(nodes), (op.node,), args, call, activation.node, shown)


@dataclass(frozen=True)
class LinearActivationCall(Call):
    """``activation(linear(x))``."""

    activation: str

    def fits(self, x: Tensor, layer: Any) -> bool:
        weights = parameters_of(layer)
        return weights is not None and are_plain(x, *(t for t in weights if t is not None))

    def __call__(self, x: Tensor, layer: Any) -> Tensor:
        return linear(x, *parameters_of(layer), self.activation)  # type: ignore[misc]


class LinearActivation(Pattern):
    """A linear layer and its activation."""

    anchors: ClassVar = ("activation",)

    def find(self, op: Op, reader: Reader) -> Found | None:
        layer = reader.op(op.get("input"), "linear")
        if not layer:
            return None
        name = op.get("name")
        args = layer.get("input"), linear_of(layer)
        nodes = frozenset((op.node, layer.node))
        call = LinearActivationCall(name)
        return Found(
            nodes, (op.node,), args, call, op.node, f"linear layer with activation: {name}"
        )
