"""A place in a graph that a fused call replaces, and the code that runs there."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.graph.reader import where
from llmos_kernels.graph.vocabulary import ModuleRef
from llmos_kernels.ops.linear import PLAIN_TENSORS


class Call(ABC):
    """A fused computation with the choices that a match made: a frozen dataclass."""

    @abstractmethod
    def fits(self, *args: Any) -> bool:
        """Return True if the fused computation takes ``args``, real tensors or fake ones."""

    @abstractmethod
    def __call__(self, *args: Any) -> Any:
        """Return the result; a tuple where the match has several outputs."""


class Found(NamedTuple):
    """What a pattern found.

    Args:
        nodes: the nodes that the fused call replaces.
        outputs: those of them that others use.
        args: the arguments of ``call``: nodes, ``ModuleRef``s, numbers, and tuples of these.
        call: the fused computation.
        anchor: the node that the report names, with the name of its operation.
        shown: what the report says that was found.
    """

    nodes: frozenset[Node]
    outputs: tuple[Node, ...]
    args: tuple[Any, ...]
    call: Call
    anchor: Node
    shown: str

    @property
    def where(self) -> str:
        """Return the place, such as "attention: softmax at model.py:31"."""
        place = where(self.anchor)
        return f"{self.shown}{' at ' * bool(place)}{place}"


def are_plain(*tensors: Any, mixed: bool = False) -> bool:
    """Return True if kernels take these tensors: of dtypes that they have, of no subclass.

    Never inside of ``torch.func`` and of forward-mode AD.

    Args:
        tensors: real tensors, or fake ones.
        mixed: whether the dtypes may differ. They may anyway where autocast casts them.
    """
    first = tensors[0]
    mixed = mixed or is_autocast(first)
    return (
        all(type(t) in PLAIN_TENSORS and not t.is_nested for t in tensors)
        and all(t.dtype in KERNEL_DTYPES and t.device == first.device for t in tensors)
        and (mixed or all(t.dtype == first.dtype for t in tensors))
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_autocast(t: Tensor) -> bool:
    """Return True if autocast is on for the device of ``t``."""
    return t.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(t.device.type)


class _Named:
    """A call with a name for generated code."""

    __module__ = "llmos_kernels.graph"

    def __init__(self, call: Call) -> None:
        self.call, self.__name__ = call, type(call).__name__

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


class Site:
    """The function that runs at a site: the fused call where it fits, else the stock nodes.

    Args:
        found: the match.

    Attributes:
        has_fused: whether the fused call has run so far.
    """

    __module__ = "llmos_kernels.graph"

    def __init__(self, found: Found) -> None:
        self.__name__ = re.sub(r"\W+", "_", found.shown.partition(":")[0])
        self.call, self.has_fused = found.call, False
        self.stock_args, self._stock = _stock(found)

    def __call__(self, args: tuple[Any, ...], stock_args: tuple[Any, ...]) -> Any:
        if self.call.fits(*args):
            self.has_fused = True
            return self.call(*args)
        return self._stock(None, *stock_args)


def call_module(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what ``module`` returns."""
    return module(*args, **kwargs)


def _stock(found: Found) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """Return what the nodes of a match take from outside, and a function that computes them."""
    graph, taken, copies = Graph(), dict[Any, Node](), dict[Node, Node]()

    def value(given: Any) -> Node:
        if given in copies:
            return copies[given]
        if given not in taken:
            taken[given] = graph.placeholder(f"a{len(taken)}")
        return taken[given]

    # Placeholders first: what is taken from outside is known only after all nodes were seen.
    ordered = [n for n in found.outputs[0].graph.nodes if n in found.nodes]
    for node in ordered:
        if node.op == "call_module":
            value(ModuleRef(str(node.target)))
        for used in node.all_input_nodes:
            if used not in found.nodes:
                value(used)
    for node in ordered:
        if node.op == "call_module":
            module = value(ModuleRef(str(node.target)))
            args = map_arg(node.args, value)
            kwargs = map_arg(node.kwargs, value)
            copies[node] = graph.call_function(call_module, (module, *args), kwargs)
        else:
            copies[node] = graph.node_copy(node, value)
    results = tuple(copies[n] for n in found.outputs)
    graph.output(results if len(results) > 1 else results[0])
    return tuple(taken), function_of(graph)


def function_of(graph: Graph) -> Callable[..., Any]:
    """Return ``graph`` as a function of its root module and its inputs."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<llmos_kernels.graph>", "exec"), scope)
    return scope["forward"]


def insert(found: Found, replaced: dict[Node, Node], checked: bool = False) -> Site | None:
    """Replace the nodes of ``found`` in its graph by its call.

    Args:
        found: the match.
        replaced: what took the place of nodes that matches before this one have replaced; those of
            this one are added.
        checked: whether the call is known to fit, so that the stock nodes are not needed.

    Returns:
        What runs there; None if that is the call.
    """
    graph = found.outputs[0].graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    users = [u for n in found.outputs for u in n.users if u not in found.nodes]
    last = max(found.nodes, key=order.__getitem__)
    with graph.inserting_before(min(*users, last.next, key=order.__getitem__)):
        refs: dict[ModuleRef, Node] = {}

        def at_run_time(value: Any) -> Any:
            if isinstance(value, ModuleRef):
                if value not in refs:
                    refs[value] = graph.get_attr(value.target)
                return refs[value]
            if isinstance(value, Node):
                return replaced.get(value, value)
            return tuple(map(at_run_time, value)) if isinstance(value, tuple) else value

        args = at_run_time(found.args)
        site = None if checked else Site(found)
        if site is None:
            new = graph.call_function(_Named(found.call), args)
        else:
            new = graph.call_function(site, (args, at_run_time(site.stock_args)))
        new.meta["where"] = where(found.anchor)
        results = [new]
        if len(found.outputs) > 1:
            results = [graph.call_function(item, (new, i)) for i in range(len(found.outputs))]
    for old, result in zip(found.outputs, results, strict=True):
        result.meta |= {k: v for k, v in old.meta.items() if k in ("example_value", "tensor")}
        old.replace_all_uses_with(result, lambda user: user not in found.nodes)
        replaced[old] = result
    for node in reversed(list(graph.nodes)):
        if node in found.nodes:
            graph.erase_node(node)
    return site


def item(results: tuple[Any, ...], i: int) -> Any:
    """Return one of several results."""
    return results[i]
