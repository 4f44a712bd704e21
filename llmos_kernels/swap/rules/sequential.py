"""Modules that only call their children, one after the other, with a feed-forward part to fuse.

They are recognised by watching a copy run on the meta device: hooks record which child is called
with what, and a ``TorchFunctionMode`` sees whether anything else happens to the tensors.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmos_kernels.nn.feed_forward import activation_name
from llmos_kernels.nn.fusible import is_fusible, is_plain_dropout
from llmos_kernels.nn.int8 import activated
from llmos_kernels.ops import _activations
from llmos_kernels.ops.feed_forward import feed_forward
from llmos_kernels.ops.linear import PLAIN_TENSORS, linear
from llmos_kernels.swap.calls import ModuleCall, set_training
from llmos_kernels.swap.code import has_branches
from llmos_kernels.swap.constants import (
    Constants,
    Reads,
    constants,
    have_changed,
    is_harmless_read,
)
from llmos_kernels.swap.forwards import side_effect
from llmos_kernels.swap.generated_class import GeneratedClass, generate_class
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.rules._kinks import largest_error_without_kinks
from llmos_kernels.swap.rules.linear import weight_and_bias
from llmos_kernels.swap.rules.rule import Candidate, Match, Rule, example_batch, tensor_options

_MAX_CHILDREN = 16


class SequentialStep(NamedTuple):
    """Children that are called in turn, as one fused computation or as they are.

    Args:
        children: names of children: a linear layer and an activation; or these, perhaps a Dropout,
            and a second linear layer; or any single child.
        activation: the name that ``feed_forward`` has for the activation; None for a single child.
        activation_type: the class of the activation, of which the name was found out.
    """

    children: tuple[str, ...]
    activation: str | None = None
    activation_type: type | None = None

    def apply(self, modules: Mapping[str, nn.Module | None], x: Tensor) -> Tensor:
        """Return the children applied to ``x``: by the fused op while they are those that were
        matched, else one by one."""
        children: list[Any] = [modules[name] for name in self.children]
        fused = None if self.activation is None else self._fused(children, x)
        if fused is not None:
            return fused
        for child in children:
            x = child(x)
        return x

    def _fused(self, children: list[Any], x: Tensor) -> Tensor | None:
        first, activation, *others = children
        name = self._name_of(activation)
        hidden = activated(first, x, name) if name else None
        if hidden is not None:
            for child in others:
                hidden = child(hidden)
            return hidden
        weights = weight_and_bias(first)
        if name is None or weights is None:
            return None
        if not others:
            return linear(x, *weights, name)
        second = weight_and_bias(others[-1])
        dropout = others[0] if len(others) == 2 else None
        if second is None or not (dropout is None or is_plain_dropout(dropout)):
            return None
        dropped = (dropout.p, dropout.training) if dropout else ()
        return feed_forward(x, *weights, *second, name, *dropped)

    def _name_of(self, activation: nn.Module) -> str | None:
        known = activation_name(activation)
        if known is None and type(activation) is self.activation_type:
            return None if not all(map(is_fusible, activation.modules())) else self.activation
        return known


class FusedSequential(GeneratedClass):
    """A module that calls its children in turn, with linear layers and activations fused.

    A call with one plain tensor, of the dtype of the first fused linear layer, runs ``_steps``. Any
    other call runs the forward of the class that was replaced. So does every call once a child has
    been added or removed, or an attribute by which that forward branches has changed.
    """

    _steps: tuple[SequentialStep, ...]
    #: The names of all children.
    _names: tuple[str, ...]
    #: The name of the layer whose dtype the input must have.
    _linear: str
    #: What the forward of that class branches by.
    _constants: Constants

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if (
            len(given) != 1
            or (kwargs and self._first_argument not in kwargs)
            or type(given[0]) not in PLAIN_TENSORS
            or given[0].is_nested
            or tuple(self._modules) != self._names
            or None in self._modules.values()
            or (self._constants and have_changed(self, self._constants))
            or given[0].dtype != _dtype_of(self._modules[self._linear])
        ):
            return self._replaced.forward(self, *args, **kwargs)
        (x,) = given
        for step in self._steps:
            x = step.apply(self._modules, x)
        return x


class FusedTorchSequential(FusedSequential):
    """A ``torch.nn.Sequential``, of which a slice has the original class."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._replaced(OrderedDict(list(self._modules.items())[index]))
        return self._replaced.__getitem__(self, index)


@functools.cache
def fused_sequential(
    replaced: type,
    steps: tuple[SequentialStep, ...],
    names: tuple[str, ...],
    constants: Constants = (),
) -> type:
    """Return the drop-in subclass of ``replaced`` whose forward is ``steps``.

    ``names`` are those of all children, ``constants`` what its own forward branches by.
    """
    made_by = (fused_sequential, (replaced, steps, names, constants))
    getitem = getattr(replaced, "__getitem__", None)
    is_torchs = getitem is nn.Sequential.__getitem__
    forward = FusedTorchSequential if is_torchs else FusedSequential
    linear = next(step.children[0] for step in steps if step.activation)
    members = {"_steps": steps, "_names": names, "_linear": linear, "_constants": constants}
    return generate_class(forward, replaced, made_by, **members)


def _dtype_of(layer: Any) -> torch.dtype | None:
    """Return the dtype of the input of a linear layer; None for another module."""
    weight = layer._parameters.get("weight")
    if weight is None:
        weight = layer._buffers.get("_dtype")  # Of an ``Int8Linear``.
    return None if weight is None else weight.dtype


class SequentialRule(Rule):
    """Swaps modules that call their children in turn, where a linear layer meets an activation."""

    def match(self, module: nn.Module) -> Match | None:
        cls: Any = type(module)
        steps, width = find_steps(module)
        if not steps:
            return None
        names = tuple(module._modules)
        return Match(fused_sequential(cls, steps, names, constants(module)), width)

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return one call, with an input of shape [batch, length, width]."""
        shape, options = example_batch(size), tensor_options(candidate.module)
        return [ModuleCall((torch.randn(*shape, candidate.input_width, **options),))]

    def largest_error(self, candidate: Candidate, call: ModuleCall) -> float:
        """Return the largest error; gradients are compared away from kinks of the activation."""
        return largest_error_without_kinks(candidate, call)


def find_steps(module: nn.Module) -> tuple[tuple[SequentialStep, ...], int]:
    """Return the steps of a module that calls its children in turn, and the width of its input.

    No steps, and 0, where the module does anything else, or has nothing to fuse.
    """
    children = dict(module.named_children())
    linear = {name for name, m in children.items() if weight_and_bias(m) is not None}
    if not linear or not 2 <= len(children) <= _MAX_CHILDREN or not _takes_one_argument(module):
        return (), 0
    if module._parameters or module._buffers or len(children) == len(linear):
        return (), 0
    names = {n: activation_of(m) for n, m in children.items() if n not in linear}
    if not any(names.values()) or side_effect(module):
        return (), 0
    order, width = _order_of_calls(module)
    steps = _steps(order, children, linear, names)
    return steps, width if steps else 0


def _samples() -> Tensor:
    """Return numbers of every size, [7, 147]: an activation may be bounded only far from 0."""
    far = torch.logspace(1.1, 30, 14, dtype=torch.float64, device="cpu")
    near = torch.linspace(-12, 12, 1001, dtype=torch.float64, device="cpu")
    return torch.cat([near, far, -far]).view(7, 147)


_SAMPLES = _samples()


def activation_of(module: nn.Module) -> str | None:
    """Return the name of the activation that ``module`` computes, found by its values, or None."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    known = (nn.Dropout, nn.ModuleList, nn.ModuleDict)
    if isinstance(module, known) or not _takes_one_argument(module):
        return None
    cls: Any = type(module)
    is_torchs = cls.__module__.startswith("torch.")
    if not is_torchs and (_does_more(module) or constants(module)):
        return None
    z = _SAMPLES
    copy, names = replica(module), []
    for training in (False, True):
        set_training(copy, training)
        try:
            with torch.no_grad(), Reads() as reads:
                y = copy(z.clone())
        except Exception:  # A module of another kind may raise anything.
            return None
        if not isinstance(y, Tensor) or y.shape != z.shape or y.dtype != z.dtype:
            return None
        if not is_torchs and reads.any_read and has_branches(module):  # It may decide by the shape.
            return None
        names.append(_name_of_values(z, y))
    return names[0] if names[0] == names[1] else None


def _name_of_values(z: Tensor, y: Tensor) -> str | None:
    """Return the name of the activation for which ``y`` is that of ``z``, or None."""
    for code, name in enumerate(_activations.NAMES):
        if code == _activations.NONE:
            continue
        expected = _activations.activate(z, code)
        if ((y - expected).abs() <= 1e-9 * expected.abs().clamp(min=1)).all():
            return name
    return None


def _does_more(activation: nn.Module) -> bool:
    """Return whether calling ``activation``, or modules in it, does more than compute."""
    calls = (type(m).__call__ is nn.Module.__call__ for m in activation.modules())
    return not all(calls) or bool(side_effect(activation))


def _steps(
    order: Sequence[str],
    children: Mapping[str, nn.Module],
    linear: set[str],
    activation_names: Mapping[str, str | None],
) -> tuple[SequentialStep, ...]:
    """Return the steps for children that are called in ``order``; none where nothing is fused."""
    steps: list[SequentialStep] = []
    at = 0

    def is_linear(i: int) -> bool:
        return i < len(order) and order[i] in linear

    def activation(i: int) -> str | None:
        return activation_names.get(order[i]) if i < len(order) else None

    while at < len(order):
        length = 1
        name = activation(at + 1) if is_linear(at) else None
        if name:
            dropped = at + 2 < len(order) and type(children[order[at + 2]]) is nn.Dropout
            last = at + 2 + dropped
            # A second linear layer before an activation starts the next step.
            length = last - at + 1 if is_linear(last) and not activation(last + 1) else 2
        fused: Any = (name, type(children[order[at + 1]])) if name else ()
        steps.append(SequentialStep(tuple(order[at : at + length]), *fused))
        at += length
    return tuple(steps) if any(step.activation for step in steps) else ()


def _takes_one_argument(module: nn.Module) -> bool:
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    return len(parameters) == 1 and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.POSITIONAL_ONLY,
    )


def _order_of_calls(module: nn.Module) -> tuple[list[str], int]:
    """Return the children in the order in which each takes what the one before returned.

    The second value is the width of the input, which is the ``in_features`` of one of its linear
    layers. The list is empty where anything else happens to the tensors, in eval or in train mode,
    for a batch of sequences or a single token.
    """
    weights = [w[0] for m in module.children() if (w := weight_and_bias(m)) is not None]
    for width in dict.fromkeys(w.shape[1] for w in weights):
        orders = {
            tuple(_watch(module, training, (*leading, width)))
            for training in (False, True)
            for leading in ((2, 3), (1, 1))
        }
        if len(orders) == 1 and (order := orders.pop()):
            return list(order), width
    return [], 0


class _CallsOutside(TorchFunctionMode):
    """Records whether torch is called, but for harmless reads, while no child runs."""

    depth = 0  # Of calls of children.
    any_call = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.depth and not is_harmless_read(func, args):
            self.any_call = True
        return func(*args, **(kwargs or {}))


def _watch(module: nn.Module, training: bool, shape: tuple[int, ...]) -> list[str]:
    """Return the names of the children in the order of their calls, for an input of ``shape``.

    The list is empty where a child is called twice, or with anything but the tensor that the child
    before returned, or where something else computes.
    """
    copy = replica(module, device="meta")
    set_training(copy, training)
    first = next(copy.parameters())
    tensor = torch.empty(shape, dtype=first.dtype, device="meta")
    order: list[str] = []
    outside = _CallsOutside()
    current: Any = tensor
    is_sequential = True

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal is_sequential
            if not outside.depth:
                is_sequential &= len(args) == 1 and not kwargs and args[0] is current
                order.append(name)
            outside.depth += 1

        return hook

    def after(_: nn.Module, args: Any, output: Any) -> None:
        nonlocal current
        outside.depth -= 1
        if not outside.depth:
            current = output

    for name, child in copy.named_children():
        child.register_forward_pre_hook(before(name), with_kwargs=True)
        child.register_forward_hook(after)
    try:
        with torch.no_grad(), outside:
            result = copy(tensor)
    except Exception:  # Its forward takes something else, or decides by values.
        return []
    is_sequential = is_sequential and result is current and not outside.any_call
    return order if is_sequential and len(set(order)) == len(order) else []
