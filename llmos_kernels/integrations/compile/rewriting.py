"""A graph of Dynamo with fused calls in it: found, proved, and measured if that was asked for."""

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from llmos_kernels._core.numerics import Compared, exactly, make_gradients, with_scale
from llmos_kernels._core.timing import samples
from llmos_kernels.graph import matcher
from llmos_kernels.graph.matcher import Matches
from llmos_kernels.graph.site import Found
from llmos_kernels.graph.vocabulary import ModuleRef, operation
from llmos_kernels.swap.calls import ModuleCall, perturbed
from llmos_kernels.swap.proof import DRAWS, largest_of
from llmos_kernels.swap.rules.sequential import activation_of

#: A measurement is of so many rounds at most, and takes about so many seconds.
_ROUNDS, _SECONDS = 9, 0.5


@dataclass(frozen=True)
class Outcome:
    """What became of one graph.

    Args:
        found: what was found, with file and line.
        missed: what looks like a pattern and stays, with the reason.
        why_not: why the graph stays as it was although something was found, or an empty string.
        error: the largest error over its budget; None where nothing was proved.
        speedup: the time of the old graph over that of the new one; None where it was not measured.
    """

    found: tuple[str, ...]
    missed: tuple[str, ...]
    why_not: str = ""
    error: float | None = None
    speedup: float | None = None


def rewritten(
    gm: GraphModule, inputs: Sequence[Any], prove: bool, min_gain: float | None
) -> tuple[GraphModule, Outcome]:
    """Return ``gm`` with fused calls, or ``gm`` itself where that is not right or not faster.

    Args:
        gm: a graph of Dynamo, before gradients; it is not changed.
        inputs: its example inputs.
        prove: whether the results are compared on these inputs.
        min_gain: what the old time over the new one has to be; None for no measurement.
    """
    new, matches = _copy(gm), Matches([], [])
    if not torch._C._are_functorch_transforms_active():
        matches = rewrite(new)
    found, missed = tuple(f.where for f in matches.found), tuple(matches.missed)
    if not found:
        return gm, Outcome(found, missed)
    error = speedup = None
    why_not = ""
    if prove:
        try:
            error = largest_error(gm, inputs)
        except Exception as e:  # What a graph raises on its inputs is a reason to leave it.
            why_not = (
                f"could not be proved: {type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
            )
        if error is not None and not error <= 1:
            why_not = f"it misses the error budget: {error:.2f}"
    if not why_not and min_gain is not None:
        speedup = _speedup(gm, new, inputs)
        if speedup < min_gain:
            why_not = f"{speedup:.2f}x as fast, min_gain is {min_gain}"
    outcome = Outcome(found, missed, why_not, error, speedup)
    return (gm if why_not else new), outcome


def _copy(gm: GraphModule) -> GraphModule:
    """Return a copy of the graph that shares all tensors."""
    return GraphModule(gm, copy.deepcopy(gm.graph))


def rewrite(gm: GraphModule) -> Matches:
    """Replace in ``gm`` what patterns know, and return what that was."""
    fits = partial(_fits, gm)
    matches = matcher.rewrite(
        gm.graph, fits, module_at=gm.get_submodule, activation_of=activation_of
    )
    gm.recompile()
    return matches


def _fits(gm: GraphModule, found: Found) -> bool:
    """Return True if the call of ``found`` takes the fake tensors of its arguments."""
    if getattr(found.call, "with_weights", False):
        return False  # They would be computed on their own.
    missing = object()

    def value(given: Any) -> Any:
        if isinstance(given, ModuleRef):
            return gm.get_submodule(given.target)
        if isinstance(given, Node):
            return given.meta.get("example_value", given.meta.get("val", missing))
        return tuple(map(value, given)) if isinstance(given, tuple) else given

    args = value(found.args)
    if missing in [a for a in args if not isinstance(a, (Tensor, tuple))]:
        return False
    return found.call.fits(*args)


def largest_error(gm: GraphModule, inputs: Sequence[Any]) -> float:
    """Return the largest error of outputs and gradients of the rewritten graph over its budget.

    Dropout is left out, and ``inputs`` are copied. The reference is the graph in float64. Gradients
    are those of a graph that has silu for relu: next to the kink of relu both graphs may round to
    either side of it.
    """
    stock = _without_dropout(_copy(gm))
    errors = [_error(stock, inputs, False)]
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs):
        errors.append(_error(_without_kinks(stock), inputs, True))
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def _error(stock: GraphModule, inputs: Sequence[Any], gradients: bool) -> float:
    """Return the largest error of the outputs of ``stock`` rewritten, or of their gradients."""
    ours = _copy(stock)
    rewrite(ours)

    def compared(call: ModuleCall, draw: int) -> Compared | None:
        runs = [(ours, None), (stock, torch.float64), (stock, None)]
        results = [_results(graph, call, dtype, draw * gradients) for graph, dtype in runs]
        if len({len(r) for r in results}) > 1:
            return None
        triples = [(a, b, c) for a, b, c in zip(*results, strict=True)]
        return {str(i): t for i, t in enumerate(with_scale(triples) if gradients else triples)}

    call = ModuleCall(tuple(map(_concrete, inputs)))
    more = (compared(perturbed(call), i + 2) for i in range(DRAWS))
    return largest_of(compared(call, 1), more)


def _without_dropout(gm: GraphModule) -> GraphModule:
    for node in gm.graph.nodes:
        op = operation(node, None, None)
        if op is not None and op.kind == "dropout":
            node.replace_all_uses_with(op.get("input"))
    gm.recompile()
    return gm


def _without_kinks(gm: GraphModule) -> GraphModule:
    """Return a copy of ``gm`` that computes silu where it computes relu."""
    smooth = _copy(gm)
    for node in smooth.graph.nodes:
        op = operation(node, None, None)
        if op is not None and op.kind == "activation" and op.get("name") == "relu":
            node.op, node.target = "call_function", F.silu
            node.args, node.kwargs = (op.get("input"),), {}
    smooth.recompile()
    return smooth


def _results(
    gm: GraphModule, call: ModuleCall, dtype: torch.dtype | None, draw: int
) -> list[Tensor]:
    """Return the floating point outputs, or their gradients for those drawn by the seed ``draw``.

    Args:
        gm: the graph.
        call: its inputs, which are copied.
        dtype: the dtype of floating point inputs; None is their own.
        draw: a seed; 0 for the outputs.
    """
    trained = [isinstance(v, Tensor) and v.requires_grad for v in call.args]

    def copied(t: Tensor) -> Tensor:
        made = t.detach().clone()
        return made.to(dtype) if dtype and t.is_floating_point() else made

    given = call.map(copied).args
    with torch.set_grad_enabled(bool(draw)), exactly(dtype):
        for value, is_trained in zip(given, trained, strict=True):
            if draw and is_trained:
                value.requires_grad_()
        # What a graph writes into its inputs must not be into leaves.
        outputs = gm(*(v.view_as(v) if isinstance(v, Tensor) else v for v in given))
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        floating = [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]
        if not draw:
            return floating
        floating = [o for o in floating if o.requires_grad]
        drawn = make_gradients([o.detach().double() for o in floating], draw)
        leaves = [v for v, is_trained in zip(given, trained, strict=True) if is_trained]
        gradients = torch.autograd.grad(
            floating,
            leaves,
            [g.to(o.dtype) for g, o in zip(drawn, floating, strict=True)],
            allow_unused=True,
        )
    return [g for g in gradients if g is not None]


def _concrete(value: Any) -> Any:
    """Return the number that a symbol stands for in the example inputs."""
    is_symbol = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return value.node.hint if is_symbol else value


def _speedup(old: GraphModule, new: GraphModule, inputs: Sequence[Any]) -> float:
    """Return the time of ``old`` over that of ``new``, the median of rounds."""

    given = [v.detach().clone() if isinstance(v, Tensor) else _concrete(v) for v in inputs]

    def run(gm: GraphModule) -> object:
        with torch.no_grad():
            return gm(*given)

    before, after = samples([partial(run, old), partial(run, new)], _ROUNDS, 0.0, _SECONDS, 3)
    return statistics.median(a / b for a, b in zip(before, after, strict=True))
