"""Graphs in which patterns are easier to see: in-place writes and sizes of intermediate results."""

import operator
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from llmos_kernels.graph.vocabulary import operation, rank_of

#: Operations whose result shares memory with nothing else.
_FRESH = frozenset(
    ("add", "div", "einsum", "linear", "layer_norm", "matmul", "mul", "softmax", "sub")
)
#: Methods and functions that write their result into their first argument.
_IN_PLACE: frozenset[Any] = frozenset(
    (
        *("add_", "div_", "masked_fill_", "mul_", "relu_", "sub_"),
        *(operator.iadd, operator.imul, operator.isub, operator.itruediv),
    )
)


def make_functional(graph: Graph) -> None:
    """Let what uses a tensor after an in-place write use the result of that write.

    Both are one object, so nothing changes, but the walk from use to origin meets the write.
    Only writes to the results of products, softmax and norms, which have no views then, are taken.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target not in _IN_PLACE or node.kwargs:
            continue
        written = node.args[0]
        if not isinstance(written, Node) or not _is_fresh(written):
            continue
        users = [u for u in written.users if u is not node]
        before = [u for u in users if order[u] < order[node]]
        if all(u.op == "call_method" and u.target in ("size", "expand_as") for u in before):
            last = order[node]
            for user in [u for u in users if order[u] > last]:
                user.replace_input_with(written, node)


def _is_fresh(node: Node) -> bool:
    while node.target in _IN_PLACE and isinstance(node.args[0], Node):
        node = node.args[0]
    op = operation(node, None, None)
    return op is not None and op.kind in _FRESH


def lift_sizes(graph: Graph) -> None:
    """Let sizes of intermediate results be those of what they are made of.

    The result then has one user less that a match would have to serve.
    """
    for node in reversed([n for n in graph.nodes if _is_size(n)]):
        worklist = [node]
        while worklist:
            size = worklist.pop()
            with graph.inserting_before(size):
                lifted = _lifted(graph, size)
            if lifted is None:
                continue
            _replace(size, lifted)
            graph.erase_node(size)
            worklist += [lifted] if isinstance(lifted, Node) and _is_size(lifted) else []


def _replace(old: Node, new: Any) -> None:
    """Let the users of ``old`` use ``new``, a node or a number."""

    def renewed(node: Node) -> Any:
        return new if node is old else node

    for user in list(old.users):
        user.args, user.kwargs = map_arg(user.args, renewed), map_arg(user.kwargs, renewed)


def _is_size(node: Node) -> bool:
    is_size = node.op == "call_method" and node.target == "size" and len(node.args) == 2
    return is_size and isinstance(node.args[0], Node) and isinstance(node.args[1], int)


def _lifted(graph: Graph, size: Node) -> Any:
    """Return what has the same value as ``size`` and asks other tensors, or None."""
    tensor: Any = size.args[0]
    place: Any = size.args[1]
    op, rank = operation(tensor, None, None), rank_of(tensor)
    if op is None or rank is None:
        return None
    last = place - rank if place >= 0 else place  # Counted from the last dimension.
    if op.kind == "view":
        sizes = op.get("sizes")
        return sizes[last] if len(sizes) == rank and sizes[last] != -1 else None
    if op.kind in ("cast", "softmax", "dropout"):
        return graph.call_method("size", (op.get("input"), last))
    if op.kind in ("matmul", "baddbmm"):
        names = ("input", "other") if op.kind == "matmul" else ("batch1", "batch2")
        left, right = (op.get(name) for name in names)
        if rank_of(left) != rank or rank_of(right) != rank or _are_weights(left):
            return None  # The size of a result of attention hinders nobody.
        if last >= -2:
            return graph.call_method("size", (left if last == -2 else right, last))
        return graph.call_function(broadcast_size, (last, left, right))
    if op.kind == "einsum" and not _are_weights(op.get("input")):
        inputs, _, result = op.get("equation").replace(" ", "").partition("->")
        if not inputs.replace(",", "").isalpha() or len(result) != rank:
            return None
        for operand, name in zip(inputs.split(","), ("input", "other"), strict=False):
            if result[last] in operand:
                return graph.call_method("size", (op.get(name), operand.index(result[last])))
    if op.kind in ("add", "sub", "mul", "div", "masked_fill"):
        others = [op.get("input"), op.get("mask" if op.kind == "masked_fill" else "other")]
        tensors = [t for t in others if isinstance(t, Node) and rank_of(t) is not None]
        return graph.call_function(broadcast_size, (last, *tensors))
    return None


def _are_weights(node: Any) -> bool:
    """Return True if ``node`` is a softmax, perhaps with dropout, a cast or a view after it."""
    while isinstance(node, Node):
        op = operation(node, None, None)
        if op is not None and op.kind == "softmax":
            return True
        is_step = node.op == "call_module" or (op and op.kind in ("cast", "dropout", "view"))
        node = node.args[0] if is_step and node.args else None
    return False


def broadcast_size(last: int, *tensors: Tensor) -> int:
    """Return a size of what ``tensors`` broadcast to, counted from the last dimension."""
    sizes = [t.shape[last] for t in tensors if t.ndim >= -last]
    return next((n for n in sizes if n != 1), 1)
