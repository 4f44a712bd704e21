"""Layer norms and RMS norms that are written out.

    (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias
    x / sqrt(mean(x^2) + eps) * weight

Walked from the root: upwards to what is squared, downwards through casts to weight and bias.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from llmos_kernels.graph.patterns.pattern import Pattern, is_node
from llmos_kernels.graph.reader import NoMatch, Reader
from llmos_kernels.graph.site import Call, Found, are_plain, is_autocast
from llmos_kernels.graph.vocabulary import Op, rank_of
from llmos_kernels.ops.layer_norm import layer_norm
from llmos_kernels.ops.rms_norm import rms_norm


@dataclass(frozen=True)
class NormCall(Call):
    """``layer_norm(x)`` or ``rms_norm(x)`` over the last dimension.

    Args:
        center: whether the mean is subtracted: a layer norm.
        eps: what is added to the mean of the squares.
        widens: whether x is cast to float32 before.
        narrows: the dtype that the result is cast to; "input" for that of x, None for no cast.
    """

    center: bool
    eps: float
    widens: bool
    narrows: Any

    def fits(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
        given = [t for t in (weight, bias) if t is not None]
        narrows = x.dtype if self.narrows == "input" else self.narrows
        result = narrows or (torch.float32 if self.widens else x.dtype)
        return (
            are_plain(x, *given)
            and result == x.dtype
            and not is_autocast(x)
            and x.ndim > 0
            and all(t.shape == x.shape[-1:] for t in given)
        )

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.center:
            return layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        return rms_norm(x, x.shape[-1:], weight, self.eps)


@dataclass
class _Walk:
    """What the walks from a root have found."""

    reader: Reader
    nodes: list[Node] = field(default_factory=list)

    def op(self, node: Any, *kinds: str) -> Op | None:
        """Return the operation of ``node`` if it is one of ``kinds``; then ``node`` is taken."""
        found = self.reader.op(node, *kinds)
        if found:
            self.nodes.append(found.node)
        return found

    def user(self, node: Node, *kinds: str) -> Op | None:
        """Return the operation of the only user of ``node``, if it is one of ``kinds``."""
        return self.op(next(iter(node.users)), *kinds) if self.reader.is_alone(node) else None


@dataclass(frozen=True)
class NormOfTorchCall(Call):
    """``layer_norm(x)`` or ``rms_norm(x)`` over the last dimensions.

    Args:
        center: whether it is a layer norm.
    """

    center: bool

    def fits(self, x: Tensor, norm: Any) -> bool:
        shape, *given, eps = norm
        given = [t for t in given if t is not None]
        return (
            are_plain(x, *given)
            and not is_autocast(x)
            and tuple(x.shape[x.ndim - len(shape) :]) == shape
            and (eps is None or isinstance(eps, float))
        )

    def __call__(self, x: Tensor, norm: Any) -> Tensor:
        shape, weight, bias, eps = norm
        if self.center:
            return layer_norm(x, shape, weight, bias, eps)
        return rms_norm(x, shape, weight, eps)


class NormOfTorch(Pattern):
    """A call of ``torch.nn.functional.layer_norm`` or ``rms_norm``."""

    anchors: ClassVar = ("layer_norm", "rms_norm")

    def find(self, op: Op, reader: Reader) -> Found | None:
        shape = op.get("normalized_shape")
        if "module" in op.args or not is_node(op.get("input")):
            return None  # A module is swapped by itself.
        if not all(isinstance(n, int) for n in shape):
            return None
        center = op.kind == "layer_norm"
        eps = op.get("eps", 1e-5 if center else None)
        norm = tuple(shape), op.get("weight"), op.get("bias"), eps
        args, call = (op.get("input"), norm), NormOfTorchCall(center)
        shown = f"{'layer norm' if center else 'RMS norm'}: {op.kind}"
        return Found(frozenset((op.node,)), (op.node,), args, call, op.node, shown)


class Norm(Pattern):
    """A layer norm or an RMS norm, of the operations that it consists of."""

    anchors: ClassVar = ("pow", "rsqrt", "sqrt")

    def find(self, op: Op, reader: Reader) -> Found | None:
        if op.kind == "pow":
            root = {0.5: "sqrt", -0.5: "rsqrt"}.get(reader.number(op.get("exponent")) or 0)
            if root is None:
                return None
            op = op._replace(kind=root)
        walk = _Walk(reader, [op.node])
        total = walk.op(op.get("input"), "add")
        eps, variance = _eps(total, reader) if total else (None, None)
        if eps is None:
            return None
        x, center = _of_variance(variance, walk)
        if not is_node(x):
            return None
        scaled, numerator = _scaled(op, walk)
        source, widens = _without_cast(x, walk)
        numerator, weight = _without_weight(numerator, walk)
        divided = _centered(numerator, walk) if center else numerator
        if divided is not x and (center or divided is not source):
            raise NoMatch("it divides something else than what was squared")
        if widens and any(user not in walk.nodes for user in x.users):
            source, widens = x, False
        elif widens:
            walk.nodes.append(x)
        last, narrows = _narrowed(scaled, source, walk, None)
        if weight is None:
            last, weight = _with_vector(last, "mul", walk)
        last, bias = _with_vector(last, "add", walk) if center else (last, None)
        last, narrows = _narrowed(last, source, walk, narrows)
        call = NormCall(center, eps, widens, narrows)
        shown = f"{'layer norm' if center else 'RMS norm'}: {op.kind}"
        args = source, weight, bias
        return Found(frozenset(walk.nodes), (last,), args, call, op.node, shown)


def _without_weight(numerator: Any, walk: _Walk) -> tuple[Any, Node | None]:
    """Return what is divided before it is multiplied by a weight, and that, if there is one."""
    product = walk.reader.op(numerator, "mul")
    if not product or not walk.reader.is_alone(product.node):
        return numerator, None
    for weight, other in (("input", "other"), ("other", "input")):
        vector, rest = product.get(weight), product.get(other)
        if is_node(vector, rest) and rank_of(vector) == 1 and rank_of(rest) != 1:
            walk.nodes.append(product.node)
            return rest, vector
    return numerator, None


def _without_cast(x: Node, walk: _Walk) -> tuple[Node, bool]:
    """Return x before a cast to float32, and whether there is one."""
    cast = walk.reader.op(x, "cast")
    widens = cast is not None and cast.get("dtype") is torch.float32
    return (cast.get("input"), True) if cast and widens else (x, False)


def _eps(total: Op, reader: Reader) -> tuple[float | None, Any]:
    """Return what is added to a variance, and the variance."""
    for eps, variance in (("other", "input"), ("input", "other")):
        number = reader.number(total.get(eps))
        if number is not None and is_node(total.get(variance)) and total.get("alpha", 1) == 1:
            return number, total.get(variance)
    return None, None


def _is_over_last(op: Op) -> bool:
    """Return True if ``op`` reduces the last dimension and keeps it."""
    dim, rank = op.get("dim"), rank_of(op.get("input"))
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    is_last = dim == -1 or (rank is not None and dim == rank - 1)
    return is_last and op.get("keepdim") is True and op.get("dtype") is None


def _of_variance(variance: Any, walk: _Walk) -> tuple[Any, bool]:
    """Return x of the variance of x, or of the mean of its squares, and whether it is the first."""
    if var := walk.op(variance, "var"):
        is_biased = var.get("unbiased", True) is False or var.get("correction", 1) == 0
        return (var.get("input") if is_biased and _is_over_last(var) else None), True
    mean = walk.op(variance, "mean")
    if not mean or not _is_over_last(mean):
        return None, False
    square = walk.op(mean.get("input"), "pow", "square", "mul")
    if not square:
        return None, False
    if square.kind == "pow" and walk.reader.number(square.get("exponent")) != 2:
        return None, False
    squared = square.get("input")
    if square.kind == "mul" and square.get("other") is not squared:
        return None, False
    is_difference = walk.reader.op(squared, "sub") is not None
    return (_centered(squared, walk) if is_difference else squared), is_difference


def _centered(node: Any, walk: _Walk) -> Any:
    """Return x of ``x - mean(x)``, or None."""
    difference = walk.op(node, "sub")
    mean = difference and walk.op(difference.get("other"), "mean")
    if not difference or not mean or not _is_over_last(mean):
        return None
    x = difference.get("input")
    return x if mean.get("input") is x and difference.get("alpha", 1) == 1 else None


def _scaled(root: Op, walk: _Walk) -> tuple[Node, Any]:
    """Return the node that divides something by the root, and what it divides.

    Raises:
        NoMatch: something else becomes of the root.
    """
    inverse = root.node
    if root.kind == "sqrt" and (reciprocal := walk.user(root.node, "reciprocal")):
        inverse = reciprocal.node
    is_inverse = root.kind == "rsqrt" or inverse is not root.node
    scaled = walk.user(inverse, "mul" if is_inverse else "div")
    if scaled and scaled.get("rounding_mode") is None:
        if scaled.get("other") is inverse:
            return scaled.node, scaled.get("input")
        if is_inverse:
            return scaled.node, scaled.get("other")
    raise NoMatch("it is not what its input is divided by")


def _narrowed(last: Node, source: Node, walk: _Walk, known: Any) -> tuple[Node, Any]:
    """Walk through a cast; return where it ends, and the dtype."""
    if known is not None or not walk.reader.is_alone(last):
        return last, known
    cast = walk.reader.op(next(iter(last.users)), "cast")
    if not cast or cast.get("input") is not last:
        return last, known
    like = cast.get("like")
    if like is not None and like is not source:
        return last, known
    walk.nodes.append(cast.node)
    return cast.node, cast.get("dtype") or "input"


def _with_vector(last: Node, kind: str, walk: _Walk) -> tuple[Node, Node | None]:
    """Walk through the product with a weight, or the sum with a bias; return its end, and that."""
    if not walk.reader.is_alone(last):
        return last, None
    op = walk.reader.op(next(iter(last.users)), kind)
    if not op or op.get("alpha", 1) != 1:
        return last, None
    others = [v for v in (op.get("input"), op.get("other")) if v is not last]
    if len(others) != 1 or not is_node(*others) or rank_of(others[0]) != 1:
        return last, None
    walk.nodes.append(op.node)
    return op.node, others[0]
