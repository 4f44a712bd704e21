"""Proof that a swapped module computes what the original does.

The original in float64, the original as it is and the drop-in run on the same inputs.  The error of
the drop-in must be within the error budget: twice the error of the original, and one ulp of the
largest value.  All three are replicas: parameters are copies, hooks are left out, dropout is off.
The model itself is not touched.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmos_kernels._core.numerics import (
    HOPELESS,
    Compared,
    exactly,
    judged_together,
    make_gradients,
    with_scale,
)
from llmos_kernels.swap.calls import ModuleCall, perturbed, set_training
from llmos_kernels.swap.replica import replica

#: Outputs and gradients; outputs alone; outputs alone, but not where the original returns NaN; or
#: such outputs in eval mode and without gradients, for a drop-in that computes them another way.
Extent = Literal["all", "outputs", "outputs without NaN", "inference"]
#: How many more calls are drawn where the first one misses its budget.
DRAWS = 16


@dataclass(frozen=True)
class Replicas:
    """Copies of a module: in float64, as it is, and with the class of its drop-in."""

    exact: nn.Module
    stock: nn.Module
    ours: nn.Module

    @classmethod
    def of(cls, module: nn.Module, drop_in: type) -> "Replicas":
        """Return the copies of ``module``."""
        wide = replica(module, dtype=torch.float64)
        return cls(wide, replica(module), replica(module, drop_in))


def judge(
    replicas: Replicas,
    call: ModuleCall,
    another: Callable[[ModuleCall], ModuleCall] = perturbed,
    extent: Extent = "all",
) -> float:
    """Return the largest error over its budget on ``call``, in eval and in train mode.

    "inference" is eval mode alone.

    A call that misses its budget is judged again, together with others like it: the budget is a
    multiple of torch's own error, and on few numbers the ratio of two maxima is a matter of luck.
    The others have the same large and small values at the same places, so an error that these cause
    is in all of them.

    Args:
        replicas: what runs.
        call: the inputs.
        another: returns a call like the one it gets.
        extent: what is compared.

    Returns:
        The error over its budget: 1 or less passes.
    """
    draws = (_results(replicas, another(call), extent, draw=i + 2) for i in range(DRAWS))
    return largest_of(_results(replicas, call, extent, draw=1), draws)


def largest_of(first: Compared | None, draws: Iterable[Compared | None]) -> float:
    """Return the largest error over its budget, of ``first``, or of all draws if that one misses.

    Judged together, the errors of an output or gradient are summed over the draws, and so are their
    budgets. A ``first`` whose error is ``HOPELESS`` times its budget is not judged again. The error
    is infinite where results are None or have other names than those of ``first``.
    """
    if first is None:
        return math.inf
    error = max(judged_together([first]).values(), default=0.0)
    if error <= 1 or error > HOPELESS:
        return error
    return max(judged_together(r or {} for r in itertools.chain([first], draws)).values())


def _results(replicas: Replicas, call: ModuleCall, extent: Extent, draw: int) -> Compared | None:
    """Return what is compared on one call; None where the replicas differ in the number of results.

    ``draw`` seeds the gradients of the outputs.
    """
    if extent == "inference":
        return _inference(replicas, call)
    found: Compared = {}
    # The gradient of an output, by its shape: the same for all replicas, in both modes.
    drawn: dict[torch.Size, Tensor] = {}

    def gradient_of(out: Tensor) -> Tensor:
        if out.shape not in drawn:
            (drawn[out.shape],) = make_gradients([out.detach().double()], draw)
        return drawn[out.shape].to(out.dtype)

    for training in (False, True):
        exact, exact_gradients = outputs_and_gradients(
            replicas.exact, call, training, gradient_of, torch.float64
        )
        eager, eager_gradients = outputs_and_gradients(replicas.stock, call, training, gradient_of)
        actual, actual_gradients = outputs_and_gradients(replicas.ours, call, training, gradient_of)
        if not len(actual) == len(eager) == len(exact):
            return None
        if extent == "outputs without NaN":
            actual = _but_nan(actual, eager)
        triples = list(zip(actual, exact, eager, strict=True))
        if extent == "all":
            if not len(actual_gradients) == len(eager_gradients) == len(exact_gradients):
                return None
            triples += with_scale(
                list(zip(actual_gradients, exact_gradients, eager_gradients, strict=True))
            )
        mode = "train" if training else "eval"
        found |= {f"{mode} {i}": triple for i, triple in enumerate(triples)}
    return found


def _but_nan(actual: list[Tensor], eager: list[Tensor]) -> list[Tensor]:
    """Return ``actual`` with NaN wherever ``eager`` is NaN."""
    return [a.where(a.isnan() | ~e.isnan(), e) for a, e in zip(actual, eager, strict=True)]


def _inference(replicas: Replicas, call: ModuleCall) -> Compared | None:
    """Return the outputs in eval mode and without gradients, as ``_results`` does."""

    def outputs(module: nn.Module, dtype: torch.dtype | None = None) -> list[Tensor]:
        set_training(module, False)
        given = call.map(lambda t: t.to(dtype) if dtype and t.is_floating_point() else t)
        with torch.no_grad(), exactly(dtype):
            y = given.on(module)
        return [o for o in (y if isinstance(y, (tuple, list)) else (y,)) if isinstance(o, Tensor)]

    exact = outputs(replicas.exact, torch.float64)
    eager, actual = outputs(replicas.stock), outputs(replicas.ours)
    if not len(actual) == len(eager) == len(exact):
        return None
    triples = zip(_but_nan(actual, eager), exact, eager, strict=True)
    return {f"inference {i}": triple for i, triple in enumerate(triples)}


def outputs_and_gradients(
    module: nn.Module,
    call: ModuleCall,
    training: bool,
    gradient_of: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return all outputs of ``module``, and the gradients of the first one.

    Args:
        module: what runs; its mode is changed.
        call: its inputs, which are copied.
        training: whether it runs in train mode.
        gradient_of: returns the gradient of the first output, which it gets.
        dtype: what floating point inputs are cast to; None leaves them.

    Returns:
        The output tensors, and the gradients of floating point inputs and of parameters, without
        those that are None.
    """

    def leaf(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()

    set_training(module, training)
    with torch.enable_grad():
        leaves = call.map(leaf)
        with exactly(dtype):
            y = leaves.on(module)
        outputs = [
            o for o in (y if isinstance(y, (tuple, list)) else (y,)) if isinstance(o, Tensor)
        ]
        inputs = [t for t in leaves.tensors if t.requires_grad]
        gradients = torch.autograd.grad(
            outputs[0],
            [*inputs, *module.parameters()],
            gradient_of(outputs[0]),
            allow_unused=True,
        )
    return [o.detach() for o in outputs], [g for g in gradients if g is not None]
