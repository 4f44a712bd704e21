"""Keys or values whose heads are repeated, so that several heads of the query share one."""

from typing import Any, NamedTuple

from torch.fx import Node

from llmos_kernels.graph.reader import Reader
from llmos_kernels.graph.vocabulary import Op, rank_of

_ALL = slice(None)


class Repeated(NamedTuple):
    """Keys or values as the attention op takes them.

    Args:
        tensor: [batch, kv_heads, length, head_dim], before its heads are repeated.
        times: how often each head is repeated, one after the other: a number or a node.
        nodes: the nodes that repeat them.
    """

    tensor: Node
    times: Any
    nodes: tuple[Node, ...]


def repeated_heads(node: Node, reader: Reader) -> Repeated | None:
    """Return what ``node`` repeats, or None.

    It is ``repeat_interleave(times, 1)``, or the same as views of an expanded tensor:
    ``x[:, :, None].expand(batch, kv_heads, times, length, head_dim).reshape(batch, heads, ...)``.
    """
    if rank_of(node) != 4 or not reader.is_alone(node):
        return None
    interleaved = reader.op(node, "repeat_interleave")
    if interleaved:
        if interleaved.get("dim") not in (1, -3) or rank_of(interleaved.get("input")) != 4:
            return None
        return Repeated(interleaved.get("input"), interleaved.get("repeats"), (node,))
    joined = reader.op(node, "view")
    expanded = joined and reader.op(joined.get("input"), "expand")
    parted = expanded and reader.op(expanded.get("input"), "unsqueeze", "getitem")
    if not (joined and expanded and parted and _parts_heads(parted)):
        return None
    batch, heads, length, dim = parted.get("input").meta["example_value"].shape
    inner = expanded.node.meta["example_value"].shape
    times = inner[2] if len(inner) == 5 else 0
    if inner != (batch, heads, times, length, dim):
        return None
    if node.meta["example_value"].shape != (batch, heads * times, length, dim):
        return None
    nodes = node, expanded.node, parted.node
    if not all(map(reader.is_alone, nodes)):
        return None
    return Repeated(parted.get("input"), expanded.get("sizes")[2], nodes)


def _parts_heads(op: Op) -> bool:
    """Return True if ``op`` makes [batch, kv_heads, 1, length, head_dim] of its input."""
    if rank_of(op.get("input")) != 4:
        return False
    if op.kind == "unsqueeze":
        return op.get("dim") in (2, -3)
    index = op.get("index")
    if not isinstance(index, tuple) or index[:3] != (_ALL, _ALL, None):
        return False
    return all(i in (_ALL, Ellipsis) for i in index[3:])
