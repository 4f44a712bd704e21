"""Forwards in which fused calls take the place of what patterns know, made once for each use.

A plan is a forward for certain kinds of arguments and certain values of what the original forward
has read: attributes, parts of a configuration, global variables. It serves every module of its
class for which all that is so.
"""

import functools
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmos_kernels.graph.matcher import rewrite
from llmos_kernels.graph.site import Site, function_of
from llmos_kernels.ops.linear import PLAIN_TENSORS
from llmos_kernels.swap.calls import PLAIN, object_as_meta
from llmos_kernels.swap.constants import frozen
from llmos_kernels.swap.outside import Outside
from llmos_kernels.swap.rules.sequential import activation_of
from llmos_kernels.swap.traced_values import CannotTrace, Mismatch, Opaque, Read, Slot
from llmos_kernels.swap.tracer import constant_of, module_writes, signature
from llmos_kernels.swap.tracing import trace

#: More plans of a class than this are not made: its arguments are of ever new kinds, or each of its
#: modules has other attributes. And more for one module and form of arguments: it branches by ever
#: other sizes, or a number among its arguments or attributes is another at each call.
_MAX_PLANS, _MAX_OF_MODULE = 1024, 8
_LOCK = threading.RLock()


class Plan(NamedTuple):
    """What became of a forward.

    Args:
        run: the new forward, a function of the module and of its tensors; None to keep the old.
        found: what was replaced, as the report shows it.
        sites: what runs there.
        missed: what looks like a pattern and stays, with the reason; or why there is no forward.
        reads: what the old forward has read of the module, for which the plan holds.
        outside: the same of what it has read from outside of the module.
        autocast: whether the plan holds under autocast.
        activations: the activations that were fused.
        dropout: the probabilities of dropout that are no part of a module.
        has_branches: whether ``run`` may raise Mismatch: the forward branches on sizes, or on parts
            of what a child returns.
        children: the ``signature`` of each child that is not one of torch's.
        known: the modules whose children have these signatures.
    """

    run: Callable[..., Any] | None
    found: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    missed: tuple[str, ...] = ()
    reads: tuple[Read, ...] = ()
    outside: tuple[Outside, ...] = ()
    autocast: bool = True
    activations: tuple[str, ...] = ()
    dropout: tuple[float, ...] = ()
    has_branches: bool = False
    children: dict[str, Any] = {}  # noqa: RUF012  It is never changed.
    known: Any = None

    def holds(self, module: nn.Module) -> bool:
        """Return True if what the old forward would read of ``module`` is as it was then."""
        for path, value in self.reads:
            try:
                found = functools.reduce(getattr, path, module)
            except AttributeError:
                return False
            if found is not value and not _same(found, value):
                return False
        if not all(o.holds() for o in self.outside):
            return False
        if not self.children or module in self.known:
            return True
        same = all(signature(module.get_submodule(n)) == s for n, s in self.children.items())
        if same:
            self.known.add(module)
        return same


def _same(found: Any, value: Any) -> bool:
    if isinstance(found, Tensor):
        return False
    return (type(found) is type(value) and found == value) or frozen(found) == value


class Arguments(NamedTuple):
    """The arguments of one call.

    Args:
        kinds: what decides which plan takes the call.
        inputs: the tensors and objects among them, which the plan gets.
        given: all arguments by name, with a ``Slot`` for each of the inputs.
    """

    kinds: tuple[Any, ...]
    inputs: tuple[Any, ...]
    given: dict[str, Any]


@functools.cache
def _parameters(cls: Any) -> tuple[tuple[str, Any, bool], ...] | None:
    """Return name, default and whether positional of the parameters of a forward.

    None where one has ``*args``.
    """
    _, *parameters = inspect.signature(cls.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return tuple(
        (p.name, p.default, p.kind is not p.KEYWORD_ONLY)
        for p in parameters
        if p.kind is not p.VAR_KEYWORD
    )


def arguments_of(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Return the arguments of a call of the forward of ``cls``; None if no plan can take them."""
    parameters = _parameters(cls)
    if parameters is None or len(args) > len(parameters):
        return None
    given: dict[str, Any] = {}
    for i, (name, default, _) in enumerate(parameters):
        if i < len(args):
            given[name] = args[i]
        elif name in kwargs:
            given[name] = kwargs[name]
        elif default is inspect.Parameter.empty:
            return None
        else:
            given[name] = default
    for name, value in kwargs.items():
        given.setdefault(name, value)
    inputs: list[Any] = []
    sorted_out = {name: _kind_and_slot(name, value, inputs) for name, value in given.items()}
    if any(made is None for made in sorted_out.values()):
        return None
    kinds = tuple((name, made[0]) for name, made in sorted_out.items() if made)
    return Arguments(kinds, tuple(inputs), {n: made[1] for n, made in sorted_out.items() if made})


def _kind_and_slot(name: str, value: Any, inputs: list[Any]) -> tuple[Any, Any] | None:
    """Return what decides about a plan of an argument, and the argument with slots for inputs.

    None where no plan can take it. Tensors and objects are appended to ``inputs``.
    """
    if isinstance(value, Tensor):
        if type(value) not in PLAIN_TENSORS or value.is_nested:
            return None
        inputs.append(value)
        return (value.ndim, value.dtype, value.device), Slot(name, len(inputs) - 1)
    if isinstance(value, (*PLAIN, torch.dtype, torch.device)):
        return (type(value), value), value
    if type(value) in (tuple, list):
        parts = [_kind_and_slot(f"{name}_{i}", v, inputs) for i, v in enumerate(value)]
        if any(part is None for part in parts):
            return None
        return (type(value), *(p[0] for p in parts if p)), type(value)(p[1] for p in parts if p)
    inputs.append(value)
    return type(value), Slot(name, len(inputs) - 1)


#: The plans of a class, by the kinds of arguments.
Plans = dict[Hashable, list[Plan]]


class _Known:
    """What is known of the calls of one module.

    Args:
        last: the plan that took the last call with arguments of a kind: it is tried first.
        made: how many plans were made for it, by the kinds of arguments without their numbers.
    """

    def __init__(self) -> None:
        self.last: dict[Hashable, Plan] = {}
        self.made: Counter[Hashable] = Counter()


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, _Known]" = weakref.WeakKeyDictionary()


def _without_numbers(kind: Any) -> Any:
    if isinstance(kind, tuple):
        return tuple(map(_without_numbers, kind))
    return type(kind) if isinstance(kind, (int, float)) else kind


def plan_of(plans: Plans, module: nn.Module, cls: type, arguments: Arguments) -> Plan:
    """Return the plan for a call, which is made where there is none yet.

    Args:
        plans: the plans of ``cls``, to which a new one is added.
        module: the module that is called.
        cls: its original class.
        arguments: those of the call.
    """
    return next(_plans_of(plans, module, cls, arguments))


def _plans_of(plans: Plans, module: nn.Module, cls: type, arguments: Arguments) -> Iterator[Plan]:
    """Yield the plans that may fit a call, the last of them a new one if it is to be made."""
    known = _KNOWN.get(module)
    if known is None:
        known = _KNOWN[module] = _Known()
    kinds = arguments.kinds
    first = known.last.get(kinds)
    if first is not None and first.holds(module):
        yield first
    for plan in plans.get(kinds, ()):
        if plan is not first and plan.holds(module):
            known.last[kinds] = plan
            yield plan
    if torch.compiler.is_compiling() or _is_watched():
        yield Plan(None, missed=("it was not traced before",))
        return
    form = _without_numbers(kinds)
    with _LOCK:
        if known.made[form] >= _MAX_OF_MODULE or sum(map(len, plans.values())) >= _MAX_PLANS:
            yield Plan(None, missed=("its arguments are of too many kinds",))
            return
        known.made[form] += 1
        plan = _make(module, cls, arguments)
        plans.setdefault(kinds, []).append(plan)
    known.last[kinds] = plan
    yield plan


#: The result of a call that the original forward has to answer.
NOT_RUN = object()


def run(plans: Plans, module: nn.Module, cls: type, arguments: Arguments) -> Any:
    """Return the result of a call by the plan that fits it, or ``NOT_RUN``.

    Args:
        plans: the plans of ``cls``, to which a new one may be added.
        module: the module that is called.
        cls: its original class.
        arguments: those of the call.
    """
    for plan in _plans_of(plans, module, cls, arguments):
        if plan.run is None or not (plan.autocast or not _is_autocast(arguments)):
            return NOT_RUN
        if not plan.has_branches:
            return plan.run(module, *arguments.inputs)
        try:
            return plan.run(module, *arguments.inputs)
        except Mismatch:
            if any(not isinstance(v, Tensor) for v in arguments.inputs):
                raise RuntimeError(
                    f"a part of this {cls.__name__} returned something else than when it was"
                    " traced, after an argument was changed: llmos_kernels.restore(model)"
                ) from None
    return NOT_RUN


def _is_autocast(arguments: Arguments) -> bool:
    devices = {t.device.type for t in arguments.inputs if isinstance(t, Tensor)}
    return any(torch.is_autocast_enabled(d) for d in devices if d in ("cpu", "cuda"))


def _is_watched() -> bool:
    """Return True if something sees each call of torch: a mode, or a transform of torch.func."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def _make(module: nn.Module, cls: type, arguments: Arguments) -> Plan:
    inputs = [
        v.detach().to("meta") if isinstance(v, Tensor) else Opaque(type(v), object_as_meta(v))
        for v in arguments.inputs
    ]
    traced = None
    try:
        traced = trace(module, cls, arguments.given, inputs)
        matches = rewrite(
            traced.graph,
            module_at=module.get_submodule,
            activation_of=activation_of,
            constant_at=constant_of,
            module_writes=module_writes,
        )
    except CannotTrace as e:
        reads = e.reads if traced is None else traced.reads
        return Plan(None, missed=(str(e),), reads=reads)
    calls = [f.call for f in matches.found]
    names = {a for c in calls if (a := getattr(c, "activation", None)) is not None}
    runs = function_of(traced.graph) if calls or traced.has_branches else None
    return Plan(
        _on_its_owner(runs) if runs and traced.takes_owner else runs,
        tuple(f.where for f in matches.found),
        matches.sites,
        tuple(matches.missed),
        traced.reads,
        traced.outside,
        not traced.asks_for_dtype,
        tuple(sorted(names)),
        traced.dropout,
        traced.has_branches,
        traced.children,
        weakref.WeakSet([module]),
    )


def _on_its_owner(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run``, which takes the module as an argument, too, without that argument."""
    return lambda module, *inputs: run(module, module, *inputs)
