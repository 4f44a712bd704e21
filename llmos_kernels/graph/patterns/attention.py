"""Attention that is written out: a product, a softmax and a second product.

    softmax(query key^T * scale + mask) value

Walked from the softmax: upwards through what scales and masks its input to the product with the
keys, downwards through casts and dropout to the product with the values.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch.fx import Node

from llmos_kernels.graph.einsum import Order, Product, product
from llmos_kernels.graph.patterns.attention_call import AttentionCall, Mask
from llmos_kernels.graph.patterns.pattern import Pattern, dropout_of, is_node
from llmos_kernels.graph.patterns.repeated_heads import repeated_heads
from llmos_kernels.graph.reader import NoMatch, Reader, writes
from llmos_kernels.graph.site import Found
from llmos_kernels.graph.vocabulary import Op, rank_of


@dataclass
class _Walk:
    """What the walks from a softmax have found."""

    nodes: list[Node]
    scale: float = 1.0
    scales: list[tuple[str, Any]] = field(default_factory=list)
    masks: list[tuple[Mask, Node]] = field(default_factory=list)
    casts: bool = False
    dropout: Any = None
    views: list[Op] = field(default_factory=list)
    is_plain: bool = True  # Whether both products are those of matrices.


class Attention(Pattern):
    """Product, scale, masks, softmax, dropout, product, in any of their spellings."""

    anchors: ClassVar = ("softmax",)

    def find(self, op: Op, reader: Reader) -> Found | None:
        walk = _Walk([op.node], casts=op.get("dtype") is not None)
        dim = op.get("dim")
        logits = _product(_up(op.get("input"), reader, walk, op.node), False)
        if logits is None:
            return None
        rank = rank_of(op.node)
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
        leading, flat = _leading(walk, reader, logits.node, mixed.node)
        if kept is not None and leading and rank_of(kept) != 4:
            raise NoMatch("its weights are returned with batch and heads as one dimension")
        key, value, repeats = _shared(key, mixed.right, reader, walk, orders, leading, kept)
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
            flat,
        )
        masks = tuple(node for _, node in walk.masks)
        scales = tuple(s for _, s in walk.scales)
        args = query, key, value, masks, scales, walk.dropout, leading, repeats
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
    dims, rank = {transpose.get("dim0"), transpose.get("dim1")}, rank_of(logits.right)
    if dims != {-1, -2} and (rank is None or dims != {rank - 1, rank - 2}):
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


def _shared(
    key: Node,
    value: Node,
    reader: Reader,
    walk: _Walk,
    orders: tuple[Order, ...],
    leading: tuple[Any, ...],
    kept: Node | None,
) -> tuple[Node, Node, tuple[Any, ...]]:
    """Return keys and values before their heads are repeated for the queries', and how often."""
    found = repeated_heads(key, reader), repeated_heads(value, reader)
    if any(orders) or leading or kept is not None or found[0] is None or found[1] is None:
        return key, value, ()
    walk.nodes += [*found[0].nodes, *found[1].nodes]
    return found[0].tensor, found[1].tensor, (found[0].times, found[1].times)


def _leading(
    walk: _Walk, reader: Reader, logits: Node, mixed: Node
) -> tuple[tuple[Any, ...], tuple[bool, bool]]:
    """Return batch and heads where views join and part them, and which products have them as one.

    Raises:
        NoMatch: the views do something else.
    """
    if not walk.views:
        return (), (False, False)
    for view in walk.views:
        before, after = view.get("input").meta, view.node.meta
        shapes = [m["example_value"].shape if "example_value" in m else () for m in (before, after)]
        if {3, 4} != {*map(len, shapes)} or shapes[0][-2:] != shapes[1][-2:]:
            raise NoMatch("its logits are viewed in another shape")
    leading = next((v.get("sizes")[:-2] for v in walk.views if len(v.get("sizes")) == 4), None)
    flat = rank_of(logits) == 3, rank_of(mixed) == 3
    if leading is None or not any(flat) or not walk.is_plain:
        raise NoMatch("batch and heads of its logits are not known")
    return leading, flat


class _Factors(NamedTuple):
    """The operands of a product of matrices."""

    node: Node
    left: Node
    right: Node
    transposed: bool  # Whether ``right`` is the transpose of what is wanted.
    how: Product


def _product(op: Op | None, inner_rows: bool) -> _Factors | None:
    if op is None:
        return None
    node, left, right = op.node, op.get("input"), op.get("other")
    if op.kind == "baddbmm":
        left, right = op.get("batch1"), op.get("batch2")
    if op.kind in ("matmul", "baddbmm") and is_node(left, right):
        return _Factors(node, left, right, not inner_rows, Product(None, None, None, 0))
    if op.kind != "einsum" or not is_node(left, right):
        return None
    how = product(op.get("equation"), inner_rows)
    return None if how is None else _Factors(node, left, right, False, how)


def _up(node: Any, reader: Reader, walk: _Walk, user: Node) -> Op | None:
    """Walk from the input of a softmax to the product of query and key."""
    while True:
        op = reader.op(node)
        if op is None:
            return None
        if op.kind in ("matmul", "einsum"):
            walk.is_plain = walk.is_plain and op.kind == "matmul"
            return op
        if op.kind == "baddbmm":
            return op if _baddbmm(op, reader, walk) else None
        step = {
            "add": _add,
            "sub": _without_maximum,
            "view": _view,
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
            flat = rank_of(op.node) == 3
            walk.masks.append((Mask("add", walk.scale, flat), op.get(mask)))
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


def _hidden(mask: Any, reader: Reader, walk: _Walk, hides: bool, flat: bool) -> None:
    """Add a bool mask, which hides keys, or shows them, where it is True."""
    expanded = reader.op(mask, "expand_as")
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
    walk.masks.append((Mask(kind, 1.0, flat), mask))


def _view(op: Op, reader: Reader, walk: _Walk) -> Any:
    walk.views.append(op)
    return op.get("input")


def _without_maximum(op: Op, reader: Reader, walk: _Walk) -> Any:
    """Walk through ``logits - logits.amax(-1, keepdim=True)``, which no softmax sees."""
    logits, maximum, nodes, is_kept = op.get("input"), op.get("other"), [], False
    while found := reader.op(maximum, "unsqueeze", "getitem", "detach"):
        last = rank_of(logits)
        if found.kind == "unsqueeze" and found.get("dim") not in (-1, last and last - 1):
            return None
        index = found.get("index")
        is_kept |= found.kind == "unsqueeze" or index == (Ellipsis, None)
        if found.kind == "getitem" and index not in (0, (Ellipsis, None)):
            return None
        nodes.append(found.node)
        maximum = found.get("input")
    found = reader.op(maximum, "maximum")
    if not found or found.get("input") is not logits or found.get("dim") not in (-1, (-1,), [-1]):
        return None
    if is_kept == (found.get("keepdim") is True):
        return None
    walk.nodes += [*nodes, found.node]
    return logits


def _baddbmm(op: Op, reader: Reader, walk: _Walk) -> bool:
    """Take what is added to a product and its factors; return whether that is possible."""
    beta, alpha = (reader.number(op.get(name, 1)) for name in ("beta", "alpha"))
    if beta is None or not alpha or not is_node(op.get("input")):
        return False
    added = op.get("input")
    if added.target is torch.zeros and reader.is_alone(added):
        walk.nodes.append(added)
    elif beta:
        walk.masks.append((Mask("add", beta * walk.scale, rank_of(op.node) == 3), added))
    walk.scale *= alpha
    return True


def _masked_fill(op: Op, reader: Reader, walk: _Walk) -> Any:
    if not reader.hides(op.get("value"), walk.scale):
        return None
    _hidden(op.get("mask"), reader, walk, True, rank_of(op.node) == 3)
    return op.get("input")


def _where(op: Op, reader: Reader, walk: _Walk) -> Any:
    logits, filled = op.get("input"), op.get("other")
    hides = not reader.hides(filled, walk.scale)
    if hides:
        logits, filled = filled, logits
    if not reader.hides(filled, walk.scale):
        return None
    _hidden(op.get("condition"), reader, walk, hides, rank_of(op.node) == 3)
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
            op = reader.op(user, "cast", "dropout", "matmul", "einsum", "view")
            if op and (op.get("input") is node) and user.users:
                followers.append(op)
        if len(followers) != 1 or (kept is not None and len(node.users) > 1):
            return node, kept, None
        (op,) = followers
        if len(node.users) > 1:
            kept = node
        if op.kind in ("matmul", "einsum"):
            walk.is_plain = walk.is_plain and op.kind == "matmul"
            return node, kept, op
        walk.nodes.append(op.node)
        if op.kind == "dropout":
            if walk.dropout is not None:
                return node, kept, None
            walk.dropout = dropout_of(op)
        elif op.kind == "view":
            walk.views.append(op)
        else:
            walk.casts = True
        node = op.node
