"""The backend "llmos" of torch.compile, its report, and its pass for inductor."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from llmos_kernels.integrations.compile.rewriting import Outcome, rewritten

#: The backends that may follow, and all options with their defaults.
_THEN = ("inductor", "aot_eager", "eager")
_DEFAULTS: dict[str, Any] = {"then": "inductor", "prove": True, "min_gain": None}
#: What became of each graph that was compiled, with the parameters among its inputs, and the graph
#: breaks that Dynamo had met since the one before.
_COMPILED: "list[tuple[list[weakref.ref[Any]], Outcome, Counter[str]]]" = []
_MOST_COMPILED = 4096
#: The graph breaks that belong to a graph already.
_breaks_so_far: Counter[str] = Counter()


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo: the backend "llmos" of ``torch.compile``.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        options: "then", the backend that gets the rewritten graph: "inductor" (default),
            "aot_eager" or "eager", which needs no C++ compiler; "prove", whether results and
            gradients are compared on ``example_inputs`` before (default True); "min_gain", what
            the time of the graph over that of the rewritten one, both without the next backend, has
            to be at least (default None: nothing is measured).
        mode: None or "default".

    Returns:
        The compiled function.

    Raises:
        TypeError: an option has a value of another type.
        ValueError: an option, a backend or a mode has no such name.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
        >>> compiled = torch.compile(model, backend=backend, options={"then": "eager"})
    """
    chosen = checked(options or {})
    if mode not in (None, "default"):
        raise ValueError(f"mode must be None or 'default' for the backend llmos, got {mode!r}")
    new, outcome = rewritten(gm, example_inputs, chosen["prove"], chosen["min_gain"])
    parameters = [v for v in example_inputs if isinstance(v, nn.Parameter)]
    _COMPILED.append(([weakref.ref(p) for p in parameters], outcome, _new_breaks()))
    del _COMPILED[:-_MOST_COMPILED]
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(chosen["then"])(new, list(example_inputs))


def _new_breaks() -> Counter[str]:
    """Return the graph breaks since the last call."""
    from torch._dynamo.utils import counters

    found = Counter({why.strip(): n for why, n in counters["graph_break"].items()})
    if any(found[why] < n for why, n in _breaks_so_far.items()):
        _breaks_so_far.clear()  # Dynamo has been reset.
    new = found - _breaks_so_far
    _breaks_so_far.clear()
    _breaks_so_far.update(found)
    return new


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of the backend, or raise an error that names the choices."""
    for name in options:
        if name not in _DEFAULTS:
            raise ValueError(
                f"options of the backend llmos are {', '.join(_DEFAULTS)}, got {name!r}"
            )
    chosen = _DEFAULTS | dict(options)
    if chosen["then"] not in _THEN:
        raise ValueError(f"then must be one of {', '.join(_THEN)}, got {chosen['then']!r}")
    if not isinstance(chosen["prove"], bool):
        raise TypeError(f"prove must be a bool, got {chosen['prove']!r}")
    gain = chosen["min_gain"]
    if gain is not None and (isinstance(gain, bool) or not isinstance(gain, (int, float))):
        raise TypeError(f"min_gain must be a number or None, got {gain!r}")
    if gain is not None and not 0 <= gain < math.inf:
        raise ValueError(f"min_gain must be 0 or more and finite, got {gain!r}")
    return chosen


def compile_pass() -> Callable[[Graph], None]:
    """Return a pass for inductor that puts fused calls into graphs before it compiles them.

    Nothing is proved or measured: for that there is the backend "llmos".

    Returns:
        A value for ``torch._inductor.config.pre_grad_custom_pass``, with a key for its cache.

    Example:
        >>> options = {"pre_grad_custom_pass": llmos_kernels.compile_pass()}
        >>> compiled = torch.compile(torch.nn.Linear(8, 8), options=options)
    """
    from llmos_kernels.integrations.compile.inductor_pass import CompilePass

    return CompilePass()


@dataclass(frozen=True)
class CompileReport:
    """What the backend "llmos" made of a model's graphs.

    Args:
        graphs: what became of each graph.
        breaks: why Dynamo has ended graphs of the model, with how often.
    """

    graphs: tuple[Outcome, ...]
    breaks: dict[str, int]

    def __str__(self) -> str:
        lines = []
        for i, graph in enumerate(self.graphs):
            kept = f", kept: {graph.why_not}" if graph.why_not else ""
            lines.append(f"graph {i}: {len(graph.found)} sites{kept}")
            lines += [f"  {site}" for site in graph.found]
            lines += [f"  stays: {why}" for why in graph.missed]
        lines += [f"graph break, {n} times: {why}" for why, n in self.breaks.items()]
        return "\n".join(lines) or "nothing was compiled by the backend llmos"


def compile_report(model: nn.Module) -> CompileReport:
    """Return what the backend "llmos" has made of ``model`` so far.

    Args:
        model: a module that ``torch.compile`` has compiled, or its original; it has run.

    Returns:
        For each graph the sites with file and line, what was not replaced and why, and the graph
        breaks that Dynamo met before it. A graph belongs to a model whose parameters it takes; one
        without parameters to models that have none.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> print(compile_report(torch.nn.Linear(8, 8)))
        nothing was compiled by the backend llmos
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    mine = {id(p) for p in model.parameters()}
    graphs, breaks = [], Counter[str]()
    for owned, outcome, before in _COMPILED:
        if any(id(p()) in mine for p in owned) if mine else not owned:
            graphs.append(outcome)
            breaks += before
    return CompileReport(tuple(graphs), dict(breaks))
