"""Proof that a swapped module computes what the original does.

Both run as replicas: parameters are copies, hooks are left out, random state is put back. The
model itself is not touched.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmos_kernels._core.numerics import judged_together, make_gradients
from llmos_kernels.nn.linear import linear_parameters
from llmos_kernels.swap.calls import LAYERS, Call, example_calls, permuted
from llmos_kernels.swap.chains import find_steps
from llmos_kernels.swap.norms import rms_norm_eps
from llmos_kernels.swap.replica import replica

#: What is compared, by name: ours, the exact, and stock.
Results = dict[str, tuple[Tensor, Tensor, Tensor]]
#: How many more calls are looked at where the first misses its budget, and how many are tried for one of them.
DRAWS, _TRIES = 16, 20


def largest_error(module: nn.Module, cls: type, call: Call) -> float:
    """Return the largest error over its budget of outputs and gradients, in eval and in train mode.

    A call that misses is looked at again, together with others like it: the budget is what torch's own
    result errs, and on few numbers the ratio of two maxima is a matter of luck (see ``_judged``).

    Where every key of a query is masked, an attention of torch and all its gradients may be NaN,
    ours are not: outputs are then compared elsewhere, and gradients on calls of our own.

    A hidden value of a layer or a feed-forward block that is next to 0 may round to either side of
    it, where the derivative of relu jumps, for torch as for us. So their gradients are compared in
    float32, on few rows, and on calls that have no such value.
    """
    replicas = _Replicas.of(module, cls)
    if isinstance(module, nn.MultiheadAttention) and _has_nan(replicas.exact, call):
        own = [_judged(replicas, c, permuted) for c in example_calls(module)]
        return max(_judged(replicas, call, permuted, "outputs that are no NaN"), *own)
    if not (isinstance(module, LAYERS) or find_steps(module)):
        return _judged(replicas, call, permuted)
    worst = _judged(replicas, call, permuted, "outputs")
    parameter = next(module.parameters())
    if parameter.dtype not in (torch.float32, torch.float64):
        module = replica(module, dtype=torch.float32)
        replicas = _Replicas.of(module, cls)
    for like in example_calls(module, (2, 4)):
        clear = lambda like: _without_kinks(replicas.exact, like)
        worst = max(worst, _judged(replicas, clear(like), clear))
    return worst


def _has_nan(exact: nn.Module, call: Call) -> bool:
    """Return whether a query of ``call`` sees no key, of which torch makes NaN."""
    outputs, _ = _outputs_and_gradients(exact, call, False, torch.ones_like, torch.float64)
    return any(o.isnan().any() for o in outputs)


@dataclass(frozen=True)
class _Replicas:
    """The original in float64, the original, and the drop-in."""

    exact: nn.Module
    stock: nn.Module
    ours: nn.Module

    @classmethod
    def of(cls, module: nn.Module, drop_in: type) -> "_Replicas":
        # A model's own RMS norm casts to float32. ``rms_norm_eps`` has seen that ours computes the same.
        wide = drop_in if rms_norm_eps(module) else None
        exact = replica(module, wide, dtype=torch.float64)
        return cls(exact, replica(module), replica(module, drop_in))


def _judged(
    replicas: _Replicas, call: Call, another: Callable[[Call], Call], what: str = "all"
) -> float:
    """Return ``largest_of`` the results on ``call`` and, for more, on calls like it. ``what``: "all",
    "outputs", or "outputs that are no NaN".
    """
    more = (_results(replicas, another(call), what, draw=i + 2) for i in range(DRAWS))
    return largest_of(_results(replicas, call, what, draw=1), more)


def largest_of(first: Results | None, more: Iterable[Results | None]) -> float:
    """Return the largest error over budget of ``first``; where that misses, of all draws judged together:
    for each output and gradient the sum of its errors over the sum of what they may be.

    None, or other names than ``first`` has, is infinite.
    """
    if first is None:
        return math.inf
    error = max(judged_together([first]).values(), default=0.0)
    if error <= 1 or math.isinf(error):
        return error
    return max(judged_together(r or {} for r in itertools.chain([first], more)).values())


def _results(replicas: _Replicas, call: Call, what: str, draw: int) -> Results | None:
    """Return what is compared on one call, by name; None where they differ in number. ``draw`` seeds the
    incoming gradients.
    """
    found: Results = {}
    drawn: dict[
        torch.Size, Tensor
    ] = {}  # Incoming gradients: the same for all three, in both modes.

    def incoming(out: Tensor) -> Tensor:
        if out.shape not in drawn:
            (drawn[out.shape],) = make_gradients([out.detach().double()], draw)
        return drawn[out.shape].to(out.dtype)

    for training in (False, True):
        exact, exact_gradients = _outputs_and_gradients(
            replicas.exact, call, training, incoming, torch.float64
        )
        eager, eager_gradients = _outputs_and_gradients(replicas.stock, call, training, incoming)
        actual, actual_gradients = _outputs_and_gradients(replicas.ours, call, training, incoming)
        if what == "outputs that are no NaN":
            actual = [
                a.where(a.isnan() | ~e.isnan(), e) for a, e in zip(actual, eager, strict=True)
            ]
        elif what == "all":
            exact, eager = exact + exact_gradients, eager + eager_gradients
            actual = actual + actual_gradients
        if not len(actual) == len(eager) == len(exact):
            return None
        mode = "train" if training else "eval"
        for i, compared in enumerate(zip(actual, exact, eager, strict=True)):
            found[f"{mode} {i}"] = compared
    return found


def _outputs_and_gradients(
    module: nn.Module,
    call: Call,
    training: bool,
    incoming: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """All outputs, and the gradients of the first one for the gradient ``incoming`` of it."""

    def leaf(t):
        if not t.is_floating_point():
            return t
        return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()

    module.train(training)
    with torch.enable_grad():
        leaves = call.map(leaf)
        y = leaves.on(module)
        outputs = [o for o in (y if isinstance(y, tuple) else (y,)) if isinstance(o, Tensor)]
        wanted = [v for v in leaves.values if isinstance(v, Tensor) and v.requires_grad]
        gradients = torch.autograd.grad(
            outputs[0],
            [*wanted, *module.parameters()],
            incoming(outputs[0]),
            allow_unused=True,
        )
    return [o.detach() for o in outputs], [g for g in gradients if g is not None]


def _without_kinks(exact: nn.Module, like: Call) -> Call:
    """Return a call like ``like`` on which no linear layer gives a value that is 0 but for rounding."""
    near: list[bool] = []

    def look(_, args, output):
        size = output.abs()
        near.append(bool((size <= 16 * torch.finfo(torch.float32).eps * size.max()).any()))

    handles = [
        m.register_forward_hook(look) for m in exact.modules() if linear_parameters(m) is not None
    ]
    try:
        for _ in range(_TRIES):
            call = permuted(like)
            near.clear()
            with torch.no_grad():
                call.map(lambda t: t.double() if t.is_floating_point() else t).on(exact)
            if not any(near):
                break
    finally:
        for handle in handles:
            handle.remove()
    return call
