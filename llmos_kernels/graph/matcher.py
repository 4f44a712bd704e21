"""The matcher: finds what patterns know in a graph, and replaces it by fused calls."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from llmos_kernels.graph.functional import lift_sizes, make_functional
from llmos_kernels.graph.patterns import PATTERNS
from llmos_kernels.graph.reader import NoMatch, Reader, where
from llmos_kernels.graph.site import Found, Site, insert


class Matches(NamedTuple):
    """What was found in a graph.

    Args:
        found: the matches, none of which overlap.
        missed: what looks like a pattern, with the reason why it stays.
        sites: what runs in the place of each match, where that is decided when it runs.
    """

    found: list[Found]
    missed: list[str]
    sites: tuple[Site, ...] = ()


def rewrite(
    graph: Graph, fits: Callable[[Found], bool] | None = None, **known: Callable[..., Any]
) -> Matches:
    """Replace in ``graph`` what patterns know.

    Args:
        graph: the graph, which is changed.
        fits: says of a match whether its call takes its arguments; None where that is known only
            when the graph runs, which then may run the stock nodes.
        known: what a ``Reader`` is told.
    """
    make_functional(graph)
    lift_sizes(graph)
    matches = find(Reader(graph, **known), fits or (lambda found: True))
    replaced: dict[Node, Node] = {}
    made = [insert(found, replaced, checked=fits is not None) for found in matches.found]
    graph.lint()
    return matches._replace(sites=tuple(site for site in made if site is not None))


def find(reader: Reader, fits: Callable[[Found], bool] = lambda found: True) -> Matches:
    """Return everything in a graph that fused calls can replace.

    Args:
        reader: the graph.
        fits: says of a match whether its call takes its arguments, where that is known already.
    """
    taken: set[Node] = set()
    matches = Matches([], [])
    for pattern in PATTERNS:
        for node in reader.graph.nodes:
            op = reader.op(node, *pattern.anchors)
            if op is None or node in taken:
                continue
            try:
                found = pattern.find(op, reader)
                if found is None or taken & found.nodes:
                    continue
                _check(found, reader)
                if not fits(found):
                    raise NoMatch("shapes, dtypes or dropout that the fused call does not take")
            except NoMatch as why:
                matches.missed.append(f"{op.kind} at {where(node)}: {why}")
                continue
            matches.found.append(found)
            taken |= found.nodes
    return matches


def _check(found: Found, reader: Reader) -> None:
    """Raise NoMatch where replacing the nodes would change what others see."""
    order = reader.order
    inner = found.nodes - {*found.outputs}
    outside = [n for n in inner if any(u not in found.nodes for u in n.users)]
    if outside:
        raise NoMatch(f"{outside[0].name} is used elsewhere, too")
    users = [order[u] for n in found.outputs for u in n.users if u not in found.nodes]
    inputs = [order[n] for n in _nodes_in(found.args)]
    inputs += [order[i] for n in found.nodes for i in n.all_input_nodes if i not in found.nodes]
    if not users:
        raise NoMatch("nothing uses its result")
    first = min(order[n] for n in found.nodes)
    last = min(*users, max(order[n] for n in found.nodes) + 1)
    if max(inputs, default=-1) >= last:
        raise NoMatch("what it needs is computed after its result is used")
    # Where the call goes depends on who uses its results: nothing may be written in all its range.
    last = max(order[n] for n in found.nodes)
    for node in reader.graph.nodes:
        if first < order[node] < last and node not in found.nodes and reader.writes(node):
            raise NoMatch(f"{node.name} changes a tensor in place meanwhile")


def _nodes_in(value: object) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    if isinstance(value, tuple):
        return [n for v in value for n in _nodes_in(v)]
    return []
