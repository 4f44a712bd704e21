"""Proof that a model which computes tokens alone returns at tokens what it did with padding.

Outputs at tokens, and the gradients of all parameters from these, are compared as in ``proof.py``,
in eval mode: in train mode dropout draws its masks for other shapes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels._core.numerics import Compared, exactly, make_gradients, with_scale
from llmos_kernels.swap.calls import ModuleCall, set_training, tensors_in
from llmos_kernels.swap.proof import DRAWS, largest_of
from llmos_kernels.swap.replica import replica

#: Returns the results of a call at tokens, given all of them.
AtTokens = Callable[[ModuleCall, list[Tensor]], list[Tensor]]


def largest_error(
    model: nn.Module, change: dict[nn.Module, type], call: ModuleCall, at_tokens: AtTokens
) -> float:
    """Return the largest error over its budget on ``call``.

    Args:
        model: the model; copies of it run.
        change: the new class of each module that changes.
        call: its inputs, with padding.
        at_tokens: returns what is compared.
    """
    exact, stock = replica(model, dtype=torch.float64), replica(model)
    ours = replica(model, change.get(model), classes=change)

    def results(draw: int) -> Compared | None:
        expected = _results(exact, call, at_tokens, draw, torch.float64)
        eager = _results(stock, call, at_tokens, draw)
        actual = _results(ours, call, at_tokens, draw)
        if not [*map(len, actual)] == [*map(len, eager)] == [*map(len, expected)]:
            return None
        outputs, gradients = (
            list(zip(*each, strict=True)) for each in zip(actual, expected, eager, strict=True)
        )
        compared: Any = [*outputs, *with_scale(gradients)]
        return {f"result {i}": triple for i, triple in enumerate(compared)}

    return largest_of(results(1), map(results, range(2, DRAWS + 2)))


def run(model: nn.Module, change: dict[nn.Module, type], call: ModuleCall) -> None:
    """Run a copy of ``model`` with new classes, to see that it does."""
    copied = replica(model, change.get(model), classes=change)
    set_training(copied, False)
    with torch.no_grad():
        call.on(copied)


def _results(
    model: nn.Module,
    call: ModuleCall,
    at_tokens: AtTokens,
    draw: int,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the floating point results of ``model`` at tokens, and gradients of parameters."""
    set_training(model, False)
    given = call.map(lambda t: t.to(dtype) if dtype and t.is_floating_point() else t)
    with torch.enable_grad():
        with exactly(dtype):
            result = given.on(model)
        found = at_tokens(call, list(tensors_in(result)))
        outputs = [t for t in found if t.requires_grad]
        if not outputs:
            raise ValueError("it returns no tensors that depend on its parameters")
        drawn = make_gradients([t.detach().double() for t in outputs], draw)
        gradients = torch.autograd.grad(
            outputs,
            [p for p in model.parameters() if p.is_floating_point()],
            [g.to(t.dtype) for g, t in zip(drawn, outputs, strict=True)],
            allow_unused=True,
        )
    return [t.detach() for t in found], [g for g in gradients if g is not None]
