"""A forward as a graph of torch.fx: the module's own code runs, once, with values that record.

Children are leaves: the graph calls them. Of the inputs only the number of dimensions, dtype and
device are known; sizes stay variables. What the code reads of its module and of objects such as a
configuration is recorded: the graph holds as long as all that has the same values.
"""

import inspect
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph

from llmos_kernels.graph.vocabulary import operation
from llmos_kernels.swap.code import functions_of
from llmos_kernels.swap.effects import watching
from llmos_kernels.swap.outside import Outside
from llmos_kernels.swap.traced_values import CannotTrace, Read, Slot, Value
from llmos_kernels.swap.tracer import Tracer, is_ours

_LOCK = threading.RLock()


class Traced(NamedTuple):
    """A forward as a graph.

    Args:
        graph: its placeholders are the tensors and objects among the arguments.
        reads: what was read of the module.
        outside: what was read from outside of the module.
        asks_for_dtype: whether the code asked for the dtype of a tensor, which autocast changes.
        dropout: the probabilities of dropout that is called as a function.
        has_branches: whether the graph checks something: the outcome of a branch on sizes, or
            which parts of a child's result are None.
        children: the ``signature`` of each child that is not one of torch's.
        takes_owner: whether the first placeholder is the module, of which an attribute is set.
    """

    graph: Graph
    reads: tuple[Read, ...]
    outside: tuple[Outside, ...]
    asks_for_dtype: bool
    dropout: tuple[float, ...]
    has_branches: bool
    children: dict[str, Any]
    takes_owner: bool


def trace(module: nn.Module, cls: type, arguments: dict[str, Any], inputs: Sequence[Any]) -> Traced:
    """Return the forward of ``module`` as a graph.

    Args:
        module: the module, which is not touched.
        cls: its class, the original one if it was swapped.
        arguments: the arguments of its forward by name, with a ``Slot`` for each input.
        inputs: the inputs of the graph: of each tensor one on the meta device, of an object that is
            no plain data an ``Opaque``.

    Raises:
        CannotTrace: it has a side effect, or branches on values.
    """
    tracer = Tracer(module)
    values: dict[int, Value] = {}

    def filled(given: Any) -> Any:
        if type(given) is Slot:
            values[given.place] = tracer.placeholder(given.name, inputs[given.place])
            return values[given.place]
        return type(given)(map(filled, given)) if type(given) in (tuple, list) else given

    forward: Any = cls.forward  # type: ignore[attr-defined]
    args, kwargs = _bound(forward, {name: filled(given) for name, given in arguments.items()})
    root = tracer.watched(module, cls)
    try:
        with _LOCK, torch.inference_mode(False), tracer.wrapped_functions():
            tracer.modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            functions = {f.__code__: f for f in functions_of(module) if f}
            with watching(lambda frame: tracer.is_busy or is_ours(frame), functions) as effects:
                tracer.recorded = effects.recorded
                result = forward(root, *args, **kwargs)
        if found := [*tracer.effects, *effects.found]:
            raise CannotTrace(f"its forward {found[0]}")
        tracer.graph.output(tracer.create_arg(result))
    except Exception as e:
        lines = str(e).splitlines()
        known = isinstance(e, CannotTrace)
        why = CannotTrace(str(e) if known else f"{type(e).__name__}: {lines[0] if lines else ''}")
        why.reads = tuple(tracer.reads.values())
        raise why from e
    _remove_dead(tracer.graph)
    outside = {(id(o.holder), o.path): o for o in effects.outside}
    dropped = [operation(n, None, None) for n in tracer.graph.nodes]
    rates = {op.get("p", 0.5) for op in dropped if op and op.kind == "dropout"}
    return Traced(
        tracer.graph,
        tuple(tracer.reads.values()),
        tuple(outside.values()),
        tracer.asks_for_dtype,
        tuple(rates),
        tracer.has_branches,
        tracer.children,
        tracer.owner is not None,
    )


def _bound(forward: Any, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return arguments that are given by name as ``forward`` takes them."""
    args, kwargs = [], dict[str, Any]()
    for name, parameter in list(inspect.signature(forward).parameters.items())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            kwargs |= {k: v for k, v in given.items() if k not in kwargs}
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(given.pop(name))
        elif name in given:
            kwargs[name] = given.pop(name)
    return args, kwargs


def _remove_dead(graph: Graph) -> None:
    """Remove nodes whose result nobody uses and that do nothing else."""
    for node in reversed(list(graph.nodes)):
        is_call = node.op in ("get_attr", "call_function", "call_method")
        if is_call and node.meta.get("pure", True) and not node.users:
            graph.erase_node(node)
