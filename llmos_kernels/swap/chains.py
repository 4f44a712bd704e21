"""Modules that only call their children, one after the other: found by watching them run."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmos_kernels.nn.chain import Step
from llmos_kernels.nn.linear import linear_parameters
from llmos_kernels.ops import _activations
from llmos_kernels.swap.replica import replica

_MOST_CHILDREN = 16


def find_steps(module: nn.Module) -> tuple[Step, ...]:
    """How ``fused_chain`` can run ``module``; empty where it is no chain, or has nothing to fuse."""
    children = dict(module.named_children())
    linear = {name for name, m in children.items() if linear_parameters(m) is not None}
    if not linear or not 2 <= len(children) <= _MOST_CHILDREN or not _takes_one(module):
        return ()
    if module._parameters or module._buffers or len(children) == len(linear):
        return ()
    named = {n: activation_of(m) for n, m in children.items() if n not in linear}
    if not any(named.values()):
        return ()
    return _steps(_order_of_calls(module), children, linear, named)


def input_width(module: nn.Module) -> int:
    """The last dimension of what a chain takes; raises ValueError where that is unknown."""
    for width in _widths(module):
        if _order_of_calls(module, (width,)):
            return width
    raise ValueError(f"the input width of {type(module).__name__} is unknown: pass inputs=")


def activation_of(module: nn.Module) -> str | None:
    """The name of the function that a module without parameters computes, by its values."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    if isinstance(module, (nn.Dropout, nn.ModuleList, nn.ModuleDict)) or not _takes_one(module):
        return None
    z = torch.linspace(-12, 12, 1001, dtype=torch.float64).view(7, 143)
    try:
        with torch.no_grad():
            y = replica(module)(z.clone())
    except Exception:  # It is something else.
        return None
    if not isinstance(y, Tensor) or y.shape != z.shape or y.dtype != z.dtype:
        return None
    for code, name in enumerate(_activations.NAMES):
        if code != _activations.NONE and (y - _activations.activate(z, code)).abs().max() < 1e-9:
            return name
    return None


def _steps(order, children, linear, named) -> tuple[Step, ...]:
    steps: list[Step] = []
    at = 0

    def is_linear(i):
        return i < len(order) and order[i] in linear

    def activation(i):
        return named.get(order[i]) if i < len(order) else None

    while at < len(order):
        fused, length = activation(at + 1) if is_linear(at) else None, 1
        if fused:
            dropped = at + 2 < len(order) and type(children[order[at + 2]]) is nn.Dropout
            last = at + 2 + dropped
            length = last - at + 1 if is_linear(last) and not activation(last + 1) else 2
        kind: Any = (fused, type(children[order[at + 1]])) if fused else ()
        steps.append(Step(tuple(order[at : at + length]), *kind))
        at += length
    return tuple(steps) if any(step.activation for step in steps) else ()


def _takes_one(module: nn.Module) -> bool:
    """Whether its forward has one parameter, beside self."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    return len(parameters) == 1 and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.POSITIONAL_ONLY,
    )


def _widths(module: nn.Module) -> list[int]:
    weights = [p[0] for m in module.children() if (p := linear_parameters(m)) is not None]
    return list(dict.fromkeys(w.shape[1] for w in weights))


def _order_of_calls(module: nn.Module, widths: tuple[int, ...] = ()) -> list[str]:
    """The names of the children, in the order in which each takes what the one before returned.

    Empty where anything else happens to the tensors, in eval or in train mode, for a batch of
    sequences or a single token.
    """
    for width in widths or _widths(module):
        orders = {
            tuple(_watch(module, training, (*leading, width)))
            for training in (False, True)
            for leading in ((2, 3), (1, 1))
        }
        if len(orders) == 1 and (order := orders.pop()):
            return list(order)
    return []


class _Outside(TorchFunctionMode):
    """Whether torch is asked for anything but an attribute while no child runs."""

    inside = 0
    asked = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not self.inside and getattr(func, "__name__", "") != "__get__":
            self.asked = True
        return func(*args, **(kwargs or {}))


def _watch(module: nn.Module, training: bool, shape: tuple[int, ...]) -> list[str]:
    copy = replica(module, device="meta").train(training)
    first = next(copy.parameters())
    tensor = torch.empty(shape, dtype=first.dtype, device="meta")
    order: list[str] = []
    outside = _Outside()
    state = {"tensor": tensor, "chain": True}

    def before(name):
        def hook(_, args, kwargs):
            if not outside.inside:
                single = len(args) == 1 and not kwargs and args[0] is state["tensor"]
                state["chain"] = bool(state["chain"] and single)
                order.append(name)
            outside.inside += 1

        return hook

    def after(_, args, output):
        outside.inside -= 1
        if not outside.inside:
            state["tensor"] = output

    for name, child in copy.named_children():
        child.register_forward_pre_hook(before(name), with_kwargs=True)
        child.register_forward_hook(after)
    try:
        with torch.no_grad(), outside:
            result = copy(tensor)
    except Exception:  # Its forward wants something else, or decides by values.
        return []
    chain = state["chain"] and result is state["tensor"] and not outside.asked
    return order if chain and len(set(order)) == len(order) else []
