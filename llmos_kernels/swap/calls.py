"""Calls of modules: arguments, the calls inside a model, and repeated runs of a model."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: The types of arguments and attributes that are compared and put back as values.
PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class ModuleCall:
    """The arguments of one call of a module.

    Args:
        args: positional arguments.
        kwargs: arguments by name.

    Example:
        >>> ModuleCall((torch.randn(2, 8),)).on(torch.nn.LayerNorm(8)).shape
        torch.Size([2, 8])
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: tuple[Any, ...] | Mapping[str, Any]) -> "ModuleCall":
        """Return the call with these ``inputs``: a tuple, or a mapping of arguments by name."""
        return cls(kwargs=dict(inputs)) if isinstance(inputs, Mapping) else cls(inputs)

    @property
    def values(self) -> list[Any]:
        """All arguments, first those without a name."""
        return [*self.args, *self.kwargs.values()]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, also those in tuples, lists and dicts."""
        found: dict[int, Tensor] = {}

        def note(t: Tensor) -> Tensor:
            found[id(t)] = t
            return t

        self.map(note)
        return [*found.values()]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "ModuleCall":
        """Return the call with ``fn`` of each tensor; a tensor given twice stays one tensor."""
        new: dict[int, Tensor] = {}

        def mapped(v: Any) -> Any:
            if isinstance(v, Tensor):
                if id(v) not in new:
                    new[id(v)] = fn(v)
                return new[id(v)]
            if type(v) in (tuple, list):
                return type(v)(map(mapped, v))
            return {k: mapped(x) for k, x in v.items()} if type(v) is dict else v

        return ModuleCall(tuple(map(mapped, self.args)), mapped(self.kwargs))

    def copied(self) -> "ModuleCall":
        """Return a deep copy; an argument given twice stays one object."""
        return self._with_copies(lambda v: True)

    def _with_copies(
        self, of: Callable[[Any], bool], copy_of: Callable[[Any], Any] | None = None
    ) -> "ModuleCall":
        memo: dict[int, Any] = {}

        def copied(v: Any) -> Any:
            if isinstance(v, PLAIN) or not of(v):
                return v
            if id(v) not in memo:
                memo[id(v)] = (copy_of or _copy)(v)
            return memo[id(v)]

        kwargs = {k: copied(v) for k, v in self.kwargs.items()}
        return ModuleCall(tuple(map(copied, self.args)), kwargs)

    @property
    def rows(self) -> int:
        """The number of rows of features in the first tensor; of integers, the number of tokens."""
        first = next((v for v in self.values if isinstance(v, Tensor)), None)
        if first is None:
            return 1
        return first.shape[:-1].numel() if first.is_floating_point() else first.numel()

    def on(self, module: nn.Module) -> Any:
        """Return what ``module`` returns for these arguments, of which objects are copies."""
        call = self if all(map(_is_data, self.values)) else self._with_copies(_is_object)
        return module(*call.args, **call.kwargs)


def _is_data(value: Any) -> bool:
    """Return True for tensors and plain data, and for tuples, lists and dicts of them."""
    if isinstance(value, (Tensor, *PLAIN)):
        return True
    if type(value) is dict:
        value = tuple(value.values())
    return type(value) in (tuple, list) and all(map(_is_data, value))


def _is_object(value: Any) -> bool:
    return not _is_data(value)


def perturbed(call: ModuleCall) -> ModuleCall:
    """Return ``call`` with each floating point number changed at random by up to 1/32 of itself.

    All roundings are other ones then, while large and small columns, zeros and infinities stay
    where they are.
    """

    def changed(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        wide = torch.promote_types(t.dtype, torch.float32)
        return (t * (1 + (torch.rand_like(t, dtype=wide) - 0.5) / 16)).to(t.dtype)

    return call.map(changed)


def clone(t: Tensor) -> Tensor:
    """Return a copy of ``t``."""
    return t.detach().clone()


def as_meta(t: Tensor) -> Tensor:
    """Return a tensor without memory that has shape, strides and dtype of ``t``."""
    return torch.empty_like(t, device="meta", requires_grad=False)


class _MetaCopies(TorchFunctionMode):
    """Lets ``copy.deepcopy`` make tensors without memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return as_meta(args[0])
        return func(*args, **(kwargs or {}))


def object_as_meta(value: Any) -> Any:
    """Return a deep copy of an object whose tensors have no memory."""
    with _MetaCopies():
        return _copy(value)


def captured_calls(
    model: nn.Module,
    modules: list[nn.Module],
    run: Callable[[], object],
    copied: Callable[[Tensor], Tensor] = clone,
    with_objects: Collection[nn.Module] = (),
) -> dict[nn.Module, list[ModuleCall]]:
    """Return how each of ``modules`` is called while ``run()`` runs ``model``, in eval mode.

    Calls with other arguments than tensors, None, numbers and strings are left out but for those
    of ``with_objects``, and so are calls with nested tensors, which autograd supports in few
    places.

    Args:
        model: the model that contains the modules.
        modules: whose calls are captured.
        run: runs the model once.
        copied: returns what is kept of a tensor.
        with_objects: the modules of which calls with any arguments are captured.

    Returns:
        For each module that was called at most three calls with copied tensors: the first; and
        where others have fewer or more rows, those with the fewest and with the most.
    """
    found: dict[nn.Module, list[ModuleCall]] = {}
    objects = {*with_objects}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = ModuleCall(args, kwargs)
        plain = all(isinstance(v, (Tensor, *PLAIN)) for v in given.values)
        if not (plain or module in objects) or any(t.is_nested for t in given.tensors):
            return
        calls = found.setdefault(module, [])
        rows = [c.rows for c in calls]
        if not calls or given.rows < min(rows) or given.rows > max(rows):
            copy_object = object_as_meta if copied is as_meta else _copy
            calls.append(given.map(copied)._with_copies(_is_object, copy_object))
            others = sorted(calls[1:], key=lambda c: c.rows)
            calls[1:] = others[:1] + others[1:][-1:]

    handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    try:
        with evaluating(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


class ModelRun:
    """A call of a model that can be repeated and leaves no trace.

    The arguments are copied for each run. Buffers, and attributes that are numbers or strings, get
    their values back after it.

    Args:
        model: the model.
        call: its arguments.
    """

    def __init__(self, model: nn.Module, call: ModuleCall) -> None:
        self.model, self.call = model, call
        modules = list(model.modules())
        self._buffers = [
            (m._buffers, name, b, b.detach().clone())
            for m in modules
            for name, b in m._buffers.items()
            if b is not None and not b.is_inference()
        ]
        self._versions = [b._version for _, _, b, _ in self._buffers]
        self._plain_attributes = [
            (vars(m), name, value)
            for m in modules
            for name, value in vars(m).items()
            if isinstance(value, PLAIN) and name != "training"
        ]
        self._has_run = False

    def __call__(self, backward: bool = False) -> bool:
        """Run the model, and with ``backward`` compute the gradients of its parameters.

        Returns:
            Whether any parameter got a gradient.
        """
        given = self.call.copied()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients: tuple[Tensor | None, ...] = ()
        try:
            with torch.set_grad_enabled(backward):
                outputs = list(tensors_in(given.on(self.model)))
                sums = [t.sum() for t in outputs if t.requires_grad]
                if backward and sums and trained:
                    total = torch.stack(sums).sum()
                    gradients = torch.autograd.grad(total, trained, allow_unused=True)
        finally:
            self._put_back()
        return any(g is not None for g in gradients)

    def results(self) -> list[Tensor]:
        """Run the model without gradients; return the floating point tensors of its result."""
        try:
            with torch.no_grad():
                return list(tensors_in(self.call.copied().on(self.model)))
        finally:
            self._put_back()

    def _put_back(self) -> None:
        with torch.no_grad():
            for i, (buffers, name, buffer, before) in enumerate(self._buffers):
                buffers[name] = buffer
                if buffer._version != self._versions[i]:
                    buffer.copy_(before)
                    self._versions[i] = buffer._version
        changed = [p for p in self._plain_attributes if p[0].get(p[1]) is not p[2]]
        for values, name, value in changed:
            values[name] = value
        if not self._has_run:
            # An attribute that the first run leaves alone is left alone by other runs, too.
            self._plain_attributes, self._has_run = changed, True


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    try:
        return copy.deepcopy(value)
    except Exception:  # An object that cannot be copied is passed as it is.
        return value


def set_training(model: nn.Module, training: bool) -> None:
    """Put ``model`` in train or eval mode.

    Neither its method ``train`` nor its ``__setattr__`` is called: a model may have given them
    other effects.
    """
    for module in model.modules():
        vars(module)["training"] = training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode inside a ``with`` block, as ``set_training`` does."""
    modes = {m: m.training for m in model.modules()}
    try:
        set_training(model, False)
        yield
    finally:
        for module, mode in modes.items():
            vars(module)["training"] = mode


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating point tensors in a result: in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(v)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))
