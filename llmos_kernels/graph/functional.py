"""Graphs whose in-place writes to intermediate results are seen by what follows."""

import operator
from typing import Any

from torch.fx import Graph, Node

from llmos_kernels.graph.vocabulary import operation

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
