"""Attention that is written out: a product, a softmax and a second product.

    softmax(query key^T * scale + mask) value

Walked from the softmax: upwards through what scales and masks its input to the product with the
keys, downwards through casts and dropout to the product with the values.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.graph.einsum import Order, Product, product
from llmos_kernels.graph.patterns.lazy_weights import lazy_weights
from llmos_kernels.graph.patterns.pattern import Pattern, dropout_of, is_node, probability
from llmos_kernels.graph.reader import NoMatch, Reader, writes
from llmos_kernels.graph.site import Call, Found, are_plain, is_autocast
from llmos_kernels.graph.vocabulary import Op
from llmos_kernels.ops._attention_arguments import MAX_DIM
from llmos_kernels.ops.attention import scaled_dot_product_attention


class Mask(NamedTuple):
    """A mask of the logits.

    Args:
        kind: "add" for what is added, "hide" for a bool that is True where a key is hidden, "show"
            for one that is True where it is seen, "zero" where it is hidden for a mask of 0.
        factor: what the logits are multiplied by after the addition.
    """

    kind: str
    factor: float = 1.0


@dataclass(frozen=True)
class AttentionCall(Call):
    """Attention with masks and scales as the graph applies them.

    Args:
        scale: the factor of the logits that is known.
        scales: "mul" or "div" for each further one, which is an argument.
        masks: the masks, which are arguments.
        dim: the dimension of the softmax.
        casts: whether the graph casts something.
        transposed: whether the key is given as [..., head_dim, length].
        orders: the permutations that bring query, key, value and the result to their places.
        rank: the number of dimensions that ``orders`` and ``dim`` need; 0 for any.
        with_weights: whether the result is a tuple, with the weights as its second part.
    """

    scale: float
    scales: tuple[str, ...]
    masks: tuple[Mask, ...]
    dim: int
    casts: bool
    transposed: bool
    orders: tuple[Order, Order, Order, Order]
    rank: int
    with_weights: bool

    def fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: tuple[Tensor, ...],
        scales: tuple[Any, ...],
        dropout: Any,
    ) -> bool:
        if not are_plain(query, key, value) or (self.casts and is_autocast(query)):
            return False
        p, rank = probability(dropout), query.ndim
        if p is None or not rank == key.ndim == value.ndim or rank not in (3, 4):
            return False
        if self.dim not in (-1, rank - 1) or self.rank not in (0, rank):
            return False
        if self.with_weights and not self._may_wait(query, p):
            return False
        query, key, value = self._in_place(query, key, value)
        shapes_fit = query.shape[-1] <= MAX_DIM and value.shape[-1] <= MAX_DIM
        if rank == 3:
            shapes_fit = shapes_fit and query.shape[0] == key.shape[0] == value.shape[0]
        logits = (*_broadcast(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2])
        return (
            shapes_fit
            and all(_fits_scale(s) for s in scales)
            and all(
                _fits_mask(kind, m, query, logits)
                for kind, m in zip(self.masks, masks, strict=True)
            )
        )

    def _may_wait(self, query: Tensor, p: float) -> bool:
        """Return True if the weights may be computed later, if at all."""
        one_dtype = not self.casts or query.dtype == torch.float32
        return not p and one_dtype and not torch.compiler.is_compiling()

    def _in_place(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments as [..., length, head_dim]."""
        key = key.transpose(-2, -1) if self.transposed else key
        orders = zip((query, key, value), self.orders, strict=False)
        return tuple(t if order is None else t.permute(order) for t, order in orders)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: tuple[Tensor, ...],
        scales: tuple[Any, ...],
        dropout: Any,
    ) -> Any:
        query, key, value = self._in_place(query, key, value)
        scale = self.scale
        for how, s in zip(self.scales, scales, strict=True):
            if not isinstance(s, Tensor):
                scale = scale * s if how == "mul" else scale / s
            else:
                query = (query * s if how == "mul" else query / s).to(query.dtype)
        mask = _combined(self.masks, masks)
        p = probability(dropout) or 0.0
        out = scaled_dot_product_attention(query, key, value, mask, p, scale=scale)
        assert isinstance(out, Tensor)
        order = self.orders[3]
        out = out if order is None else out.permute(order)
        if not self.with_weights:
            return out
        return out, lazy_weights(query, key, mask, scale)


def _broadcast(a: torch.Size, b: torch.Size) -> tuple[int, ...]:
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def _fits_scale(scale: Any) -> bool:
    """Return True if ``scale`` is a number, or one for each row of the query or more of them."""
    if not isinstance(scale, Tensor):
        return isinstance(scale, (int, float, torch.SymInt, torch.SymFloat))
    return scale.is_floating_point() and all(n == 1 for n in scale.shape[-2:]) and scale.ndim <= 4


def _fits_mask(mask: Mask, given: Any, query: Tensor, logits: tuple[int, ...]) -> bool:
    """Return True if a mask broadcasts to the logits, without broadcasting them."""
    if not isinstance(given, Tensor) or given.ndim > len(logits) or given.device != query.device:
        return False
    if mask.kind in ("hide", "show") and given.dtype != torch.bool:
        return False
    if mask.kind == "add" and given.dtype not in KERNEL_DTYPES:
        return False
    pairs = zip(reversed(given.shape), reversed(logits), strict=False)
    return all(m == 1 or m == n for m, n in pairs)


def _combined(masks: tuple[Mask, ...], given: tuple[Tensor, ...]) -> Tensor | None:
    """Return all masks as one: bool, True where a key is seen, or to be added."""
    seen: Tensor | None = None
    added: Tensor | None = None
    for mask, m in zip(masks, given, strict=True):
        if mask.kind == "add":
            m = m if mask.factor == 1 else m * mask.factor
            added = m if added is None else added + m
        else:
            shown = m if mask.kind == "show" else m != 0 if mask.kind == "zero" else ~m
            seen = shown if seen is None else seen & shown
    if added is None or seen is None:
        return seen if added is None else added
    return torch.where(seen, added, -math.inf)


@dataclass
class _Walk:
    """What the walks from a softmax have found."""

    nodes: list[Node]
    scale: float = 1.0
    scales: list[tuple[str, Any]] = field(default_factory=list)
    masks: list[tuple[Mask, Node]] = field(default_factory=list)
    casts: bool = False
    dropout: Any = None


class Attention(Pattern):
    """Product, scale, masks, softmax, dropout, product, in any of their spellings."""

    anchors: ClassVar = ("softmax",)

    def find(self, op: Op, reader: Reader) -> Found | None:
        walk = _Walk([op.node], casts=op.get("dtype") is not None)
        dim = op.get("dim")
        logits = _product(_up(op.get("input"), reader, walk, op.node), False)
        if logits is None:
            return None
        rank = reader.rank(op.node)
        if not isinstance(dim, int) or dim < -1 or (rank and dim not in (-1, rank - 1)):
            raise NoMatch("its softmax is not over the keys")
        weights, kept, second = _down(op.node, reader, walk)
        mixed = _product(second, True)
        if mixed is None or mixed.left is not weights:
            raise NoMatch("its weights are not multiplied by values alone")
        walk.nodes += [logits.node, mixed.node]
        key, transposed = _without_transpose(logits, reader, walk)
        key = _without_cast(key, reader, walk)
        query = _without_cast(logits.left, reader, walk)
        query = _without_cast(_without_scale(query, reader, walk), reader, walk)
        orders = logits.how.left, logits.how.right, mixed.how.right, mixed.how.result
        if mixed.how.left is not None or logits.how.result is not None:
            raise NoMatch("its logits are in another order than [..., query, key]")
        call = AttentionCall(
            walk.scale,
            tuple(how for how, _ in walk.scales),
            tuple(mask for mask, _ in walk.masks),
            dim,
            walk.casts,
            transposed,
            orders,
            max(logits.how.rank, mixed.how.rank),
            kept is not None,
        )
        masks = tuple(node for _, node in walk.masks)
        scales = tuple(s for _, s in walk.scales)
        args = query, key, mixed.right, masks, scales, walk.dropout
        outputs = (mixed.node,) if kept is None else (mixed.node, kept)
        return Found(frozenset(walk.nodes), outputs, args, call, op.node, "attention: softmax")


def _without_scale(query: Node, reader: Reader, walk: _Walk) -> Node:
    """Return the query before it is scaled by a number, which becomes part of the scale."""
    scaled = reader.op(query, "mul", "div")
    if not scaled or not reader.is_alone(query) or scaled.get("rounding_mode") is not None:
        return query
    if writes(query):
        return query  # The tensor that it scales may have other users.
    inner, number = scaled.get("input"), reader.number(scaled.get("other"))
    if number is None and scaled.kind == "mul":
        inner, number = scaled.get("other"), reader.number(scaled.get("input"))
    if number is None or number == 0 or not math.isfinite(number) or not is_node(inner):
        return query
    walk.nodes.append(query)
    walk.scale *= number if scaled.kind == "mul" else 1 / number
    return inner


def _without_transpose(logits: "_Factors", reader: Reader, walk: _Walk) -> tuple[Node, bool]:
    """Return the key, and whether it is given as [..., head_dim, length]."""
    transpose = reader.op(logits.right, "transpose") if logits.transposed else None
    if not transpose or not reader.is_alone(logits.right):
        return logits.right, logits.transposed
    if {transpose.get("dim0"), transpose.get("dim1")} != {-1, -2}:
        return logits.right, True
    walk.nodes.append(logits.right)
    return transpose.get("input"), False


def _without_cast(node: Node, reader: Reader, walk: _Walk) -> Node:
    """Return a query or key before it is cast to float32, in which kernels multiply anyway."""
    cast = reader.op(node, "cast")
    if not cast or cast.get("dtype") is not torch.float32 or not reader.is_alone(node):
        return node
    walk.nodes.append(node)
    walk.casts = True
    return cast.get("input")


class _Factors(NamedTuple):
    """The operands of a product of matrices."""

    node: Node
    left: Node
    right: Node
    transposed: bool  # Whether ``right`` is the transpose of what is wanted.
    how: Product


def _product(op: Op | None, inner_rows: bool) -> _Factors | None:
    if op is None or not is_node(op.get("input"), op.get("other")):
        return None
    node, left, right = op.node, op.get("input"), op.get("other")
    if op.kind == "matmul":
        return _Factors(node, left, right, not inner_rows, Product(None, None, None, 0))
    how = product(op.get("equation"), inner_rows)
    return None if how is None else _Factors(node, left, right, False, how)


def _up(node: Any, reader: Reader, walk: _Walk, user: Node) -> Op | None:
    """Walk from the input of a softmax to the product of query and key."""
    while True:
        op = reader.op(node)
        if op is None:
            return None
        if op.kind in ("matmul", "einsum"):
            return op
        step = {
            "add": _add,
            "mul": _scale,
            "div": _scale,
            "masked_fill": _masked_fill,
            "where": _where,
            "cast": _cast,
        }.get(op.kind)
        following = None if step is None else step(op, reader, walk)
        if following is None:
            return None
        walk.nodes.append(op.node)
        node = following


def _leads_to_product(node: Any, reader: Reader) -> bool:
    """Return True if ``_up`` gets from ``node`` to a product."""
    return is_node(node) and _up(node, reader, _Walk([]), node) is not None


def _add(op: Op, reader: Reader, walk: _Walk) -> Any:
    if op.get("alpha", 1) != 1:
        return None
    for logits, mask in (("input", "other"), ("other", "input")):
        if is_node(op.get(logits), op.get(mask)) and _leads_to_product(op.get(logits), reader):
            if walk.scales:
                return None  # The mask would have to be scaled by what is not known.
            walk.masks.append((Mask("add", walk.scale), op.get(mask)))
            return op.get(logits)
    return None


def _scale(op: Op, reader: Reader, walk: _Walk) -> Any:
    if op.get("rounding_mode") is not None:
        return None
    logits, by = op.get("input"), op.get("other")
    if op.kind == "mul" and not _leads_to_product(logits, reader):
        logits, by = by, logits
    number = reader.number(by)
    if number is None:
        if not is_node(by):
            return None
        walk.scales.append((op.kind, by))
    elif number == 0 or not math.isfinite(number):
        return None
    else:
        walk.scale *= number if op.kind == "mul" else 1 / number
    return logits


def _hidden(mask: Any, reader: Reader, walk: _Walk, hides: bool) -> None:
    """Add a bool mask, which hides keys, or shows them, where it is True."""
    expanded = reader.op(mask, "expand")
    if expanded and reader.is_alone(mask):  # The mask broadcasts as it is.
        walk.nodes.append(mask)
        mask = expanded.get("input")
    kind = "hide" if hides else "show"
    equal = reader.op(mask, "eq")
    inverted = reader.op(mask, "logical_not")
    if equal and hides and equal.get("other") == 0 and reader.is_alone(mask):
        walk.nodes.append(mask)
        kind, mask = "zero", equal.get("input")
    elif inverted and reader.is_alone(mask):
        walk.nodes.append(mask)
        kind, mask = "show" if hides else "hide", inverted.get("input")
    walk.masks.append((Mask(kind), mask))


def _masked_fill(op: Op, reader: Reader, walk: _Walk) -> Any:
    if not reader.hides(op.get("value"), walk.scale):
        return None
    _hidden(op.get("mask"), reader, walk, hides=True)
    return op.get("input")


def _where(op: Op, reader: Reader, walk: _Walk) -> Any:
    logits, filled = op.get("input"), op.get("other")
    hides = not reader.hides(filled, walk.scale)
    if hides:
        logits, filled = filled, logits
    if not reader.hides(filled, walk.scale):
        return None
    _hidden(op.get("condition"), reader, walk, hides)
    return logits


def _cast(op: Op, reader: Reader, walk: _Walk) -> Any:
    if op.get("dtype") in (torch.float16, torch.bfloat16):
        return None
    walk.casts = True
    return op.get("input")


def _down(node: Node, reader: Reader, walk: _Walk) -> tuple[Node, Node | None, Op | None]:
    """Walk from a softmax to the product of weights and value.

    Returns:
        The weights that are multiplied, those that something else uses too, and the product.
    """
    kept: Node | None = None
    while True:
        followers = []
        for user in node.users:
            op = reader.op(user, "cast", "dropout", "matmul", "einsum")
            if op and (op.get("input") is node) and user.users:
                followers.append(op)
        if len(followers) != 1 or (kept is not None and len(node.users) > 1):
            return node, kept, None
        (op,) = followers
        if len(node.users) > 1:
            kept = node
        if op.kind in ("matmul", "einsum"):
            return node, kept, op
        walk.nodes.append(op.node)
        if op.kind == "dropout":
            if walk.dropout is not None:
                return node, kept, None
            walk.dropout = dropout_of(op)
        else:
            walk.casts = True
        node = op.node
