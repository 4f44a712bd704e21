"""The proof of modules with an activation that has a kink, such as ReLU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.swap.calls import ModuleCall, perturbed
from llmos_kernels.swap.proof import judge
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.rules.linear import weight_and_bias
from llmos_kernels.swap.rules.rule import Candidate

_ATTEMPTS = 20
#: Batch size and sequence length of the calls on which gradients are compared. On few rows it is
#: likely that no value is next to a kink.
_SIZE = (2, 4)


def largest_error_without_kinks(candidate: Candidate, call: ModuleCall) -> float:
    """Return the largest error of outputs on ``call``, and of gradients on calls away from kinks.

    A pre-activation next to 0 may be rounded to either side of it, where the derivative of ReLU
    jumps, by torch as well as by us. So gradients are compared in float32, on example calls of few
    rows that have no such value.
    """
    replicas = candidate.rule.replicas(candidate)
    worst = judge(replicas, call, extent="outputs")
    module = candidate.module
    parameter = next(module.parameters())
    if parameter.dtype not in (torch.float32, torch.float64):
        candidate = replace(candidate, module=replica(module, dtype=torch.float32))
        replicas = candidate.rule.replicas(candidate)
    for example in candidate.example_calls(_SIZE):
        clear = _without_kinks(replicas.exact)
        worst = max(worst, judge(replicas, clear(example), clear))
    return worst


def _without_kinks(exact: nn.Module) -> Callable[[ModuleCall], ModuleCall]:
    """Return a function that perturbs a call until no linear layer returns a value next to 0.

    After ``_ATTEMPTS`` attempts the last one is returned as it is.

    Args:
        exact: the module whose linear layers are looked at, in float64.
    """

    def clear(call: ModuleCall) -> ModuleCall:
        is_near_zero: list[bool] = []

        def look(module: nn.Module, args: Any, output: Tensor) -> None:
            size = output.abs()
            threshold = 16 * torch.finfo(torch.float32).eps * size.max()
            is_near_zero.append(bool((size <= threshold).any()))

        layers = [m for m in exact.modules() if weight_and_bias(m) is not None]
        handles = [m.register_forward_hook(look) for m in layers]
        try:
            for _ in range(_ATTEMPTS):
                drawn = perturbed(call)
                is_near_zero.clear()
                with torch.no_grad():
                    drawn.map(lambda t: t.double() if t.is_floating_point() else t).on(exact)
                if not any(is_near_zero):
                    break
        finally:
            for handle in handles:
                handle.remove()
        return drawn

    return clear
