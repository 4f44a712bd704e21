"""The tracer of a forward: makes the nodes of its graph, and records what its code reads."""

import inspect
import math
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from llmos_kernels.graph.reader import writes
from llmos_kernels.swap.calls import PLAIN
from llmos_kernels.swap.constants import MISSING, frozen
from llmos_kernels.swap.forwards import may_have_effects
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.traced_values import (
    UNKNOWN,
    AttributeValue,
    CannotTrace,
    Opaque,
    Read,
    Shape,
    Value,
    any_value,
    check,
    check_kinds,
    detached,
    is_check,
    kinds_of,
    metas,
)
from llmos_kernels.swap.watched_classes import WATCH, watching_class

#: Functions that do not see a recorded number among their arguments.
_WRAPPED: tuple[tuple[Any, str], ...] = (
    *((math, name) for name in ("sqrt", "log", "log2", "exp", "pow", "ceil", "floor")),
    *((torch, name) for name in ("arange", "empty", "eye", "full", "ones", "tensor", "zeros")),
)
#: The modules whose code records, and is not a forward's.
_OUR_CODE = tuple(
    f"llmos_kernels.swap.{name}"
    for name in ("effects", "traced_values", "tracer", "tracing", "watched_classes")
)
_NOT_IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class Constant:
    """A tensor that a forward made of constants, as a function of a graph."""

    __module__ = "llmos_kernels.swap"
    __name__ = "constant"

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self) -> Tensor:
        return self.value


def constant_of(node: Node) -> Tensor | None:
    """Return the tensor that ``node`` always is, or None."""
    return node.target.value if isinstance(node.target, Constant) else None


def _wrapped() -> list[Any]:
    """Return the functions that are now in the places of ``_WRAPPED``."""
    return [getattr(place, name) for place, name in _WRAPPED]


def is_torchs_or_ours(module: nn.Module) -> bool:
    """Return True if the class of ``module`` is one of torch's, or a drop-in of such a class."""
    return str(type(module).__module__).startswith(("torch.nn.", "llmos_kernels.nn"))


def module_writes(module: nn.Module) -> bool:
    """Return True if calling ``module`` may change a tensor in place."""
    if any(getattr(m, "inplace", False) is True for m in module.modules()):
        return True
    return not is_torchs_or_ours(module) and may_have_effects(module)


def signature(module: nn.Module) -> Any:
    """Return what may decide about the form of the result of ``module``: classes, options."""

    def options(m: nn.Module) -> tuple[Any, ...]:
        plain = {k: data for k, v in vars(m).items() if (data := frozen(v)) is not MISSING}
        absent = [n for n, p in m._parameters.items() if p is None]
        plain = {k: v for k, v in plain.items() if k != "training" and k[0] != "_"}
        cls = vars(type(m)).get("_replaced", type(m))
        return cls, tuple(sorted(plain.items(), key=lambda i: i[0])), tuple(absent)

    return tuple((name, *options(m)) for name, m in module.named_modules())


def _of_update(kind: str, target: Any, args: Any) -> Any:
    """Return what a call of ``update`` of a cache returns: longer, and else like what it gets."""
    is_update = kind == "call_method" and target == "update"
    if is_update and isinstance(getattr(args[0], "meta", None), Opaque):
        metas = [a.meta for a in args[1:3] if isinstance(a, Value)]
        if len(metas) == 2 and all(isinstance(m, Tensor) for m in metas):
            return tuple(metas)
    return UNKNOWN


def is_ours(frame: FrameType) -> bool:
    """Return True if the code of ``frame`` is a part of the tracer."""
    return str(frame.f_globals.get("__name__")).startswith(_OUR_CODE)


class Tracer(GraphAppendingTracer):
    """Records what the forward of a module does with values, and what it reads.

    Args:
        module: the module, which is not touched.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(Graph())
        self.module = module
        self.reads: dict[tuple[str, ...], Read] = {}
        self.effects: list[str] = []
        self.modes: tuple[bool, ...] = ()
        self.asks_for_dtype = False
        self.recorded: dict[tuple[CodeType, int], set[str]] = {}
        self.owner: Node | None = None  # The module, where its forward sets an attribute of it.
        self.has_effects = False  # Whether a call so far may have changed something.
        self.has_branches = False
        self.children: dict[str, Any] = {}
        self.is_busy = False  # While it records, what runs is not the forward's own code.
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._originals = _wrapped()
        self._metas: dict[str, nn.Module] = {}
        self._watched: dict[int, Any] = {}

    # What the graph is made of.

    def proxy(self, node: Node) -> Proxy:
        return Value(node, self)

    def placeholder(self, name: str, value: Any) -> "Value":
        made = Value(self.create_node("placeholder", name, (), {}), self)
        made.meta = value
        if isinstance(value, Tensor):
            made.node.meta["example_value"] = value
        return made

    def create_arg(self, a: Any) -> Any:
        if type(a) in (Value, AttributeValue):
            return a.node
        if type(a) is Shape:
            return tuple(map(self.create_arg, a))
        if isinstance(a, Tensor):
            # Such as a part that a function has from where it was defined: its hooks would not run.
            if a.requires_grad or any(a is b for b in self.module.buffers()):
                raise CannotTrace("its forward uses a parameter other than as an attribute")
            constant = Constant(a.detach())
            return self.create_node("call_function", constant, (), {})
        if isinstance(a, (torch.device, torch.dtype)):
            return a
        if isinstance(a, (tuple, list, dict, slice)) or a is None or a is Ellipsis:
            return super().create_arg(a)
        if isinstance(a, (*PLAIN, torch.memory_format, torch.layout)):
            return a
        raise CannotTrace(f"passes a {type(a).__name__} on")

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        if (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) != self.modes:
            raise CannotTrace("its forward changes whether gradients are recorded")
        was_busy, self.is_busy = self.is_busy, True
        try:
            made: Any = super().create_proxy(kind, target, args, kwargs, *rest, **more)
            made.meta = self._meta(kind, target, args, kwargs)
            made.node.meta["where"] = _user_line()
            if kind == "call_module":
                self._note_child(target, made)
            if isinstance(made.meta, Tensor):
                made.node.meta["example_value"] = made.meta
            made.node.meta["pure"] = self._is_pure(made.node, args)
            self.has_effects |= not made.node.meta["pure"]
        finally:
            self.is_busy = was_busy
        return made

    def _note_child(self, target: str, made: Any) -> None:
        """Record what decides about the result of a child, whose code is not looked at."""
        child = self.module.get_submodule(target)
        if is_torchs_or_ours(child):
            return
        if made.meta is UNKNOWN:
            raise CannotTrace(f"what its part {target} returns is not known")
        path = (*target.split("."), "training")
        self.reads[path] = Read(path, child.training)
        self.children[target] = signature(child)
        kinds = kinds_of(made.meta)
        if not isinstance(kinds, tuple):
            return
        node = self.create_node("call_function", check_kinds, (made.node, kinds), {})
        node.meta["pure"] = False
        self.has_branches = True

    def _is_pure(self, node: Node, args: Any) -> bool:
        """Return True if a call changes nothing."""
        if node.op == "call_module":
            child = self.module.get_submodule(str(node.target))
            return is_torchs_or_ours(child) and not module_writes(child)
        if node.op == "call_method":
            known = isinstance(getattr(args[0], "meta", args[0]), (Tensor, tuple, int, float))
            return known and not writes(node)
        return not writes(node)

    def in_place(self, function: Any, value: Value, other: Any) -> Any:
        """Record ``value += other`` or the like."""
        self._note(sys._getframe(2), "")
        if isinstance(value.meta, (int, float)):  # A number is not changed in place.
            function = _NOT_IN_PLACE[function]
        return self.create_proxy("call_function", function, (value, other), {})

    def set_attribute(self, name: str, value: Value) -> None:
        """Record that the forward sets an attribute of its module."""
        self._note(sys._getframe(2), name)
        if self.owner is None:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self.owner = self.graph.placeholder("owner")
        node = self.graph.call_function(setattr, (self.owner, name, self.create_arg(value)))
        node.meta["pure"] = False
        self.has_effects = True

    def _note(self, frame: FrameType, what: str) -> None:
        """Note that the graph repeats what the line does at which ``frame`` is."""
        self.recorded.setdefault((frame.f_code, frame.f_lineno), set()).add(what)

    def _meta(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of a call on the meta device, or UNKNOWN."""
        try:
            given, named = metas(args), metas(kwargs)
            with self._functions(self._originals), torch.no_grad():
                if kind == "call_module":
                    if target not in self._metas:
                        child = self.module.get_submodule(target)
                        self._metas[target] = replica(child, device="meta")
                    return detached(self._metas[target](*given, **named))
                function = getattr(type(given[0]), target) if kind == "call_method" else target
                return detached(function(*given, **named))
        except Exception:  # A tensor without numbers cannot be asked for them.
            return _of_update(kind, target, args)

    # What the code reads.

    def read(self, path: tuple[str, ...], value: Any) -> Any:
        """Return an attribute as the code gets it, and record it."""
        if isinstance(value, Tensor):
            node = self.create_node("get_attr", ".".join(path), (), {})
            made = Value(node, self)
            made.meta = value.detach().to("meta")
            return made
        data = frozen(value)
        if data is not MISSING:
            self.reads[path] = Read(path, data)
            return value
        if isinstance(value, nn.Module) or inspect.isroutine(value) or isinstance(value, type):
            self.reads[path] = Read(path, value)
            return value
        if callable(value) and type(value).__module__.partition(".")[0] in ("functools", "torch"):
            self.reads[path] = Read(path, value)
            return value
        return self.watched_object(path, value)

    def fact(self, node: Node, name: str, meta: Tensor) -> Any:
        """Return what a tensor tells of itself, and record it where it belongs to the module."""
        if name == "device":
            value: Any = self.device
        elif name in ("is_cpu", "is_cuda", "is_meta", "is_mps"):
            value = self.device.type == name[3:]
        else:
            value = getattr(meta, name)
        if node.op == "get_attr":
            path = (*str(node.target).split("."), name)
            self.reads[path] = Read(path, value)
        elif node.op != "placeholder":
            self.asks_for_dtype |= name == "dtype"
        return value

    def watched_object(self, path: tuple[str, ...], value: Any) -> Any:
        """Return a shallow copy of ``value`` that records what is read of it."""
        if id(value) in self._watched:
            return self._watched[id(value)]
        if not hasattr(value, "__dict__") or isinstance(value, (list, dict, set)):
            raise CannotTrace(f"its forward uses {path[-1]}, a {type(value).__name__}")
        copied = object.__new__(watching_class(type(value)))
        copied.__dict__.update(vars(value))
        copied.__dict__[WATCH] = (self, path)
        self._watched[id(value)] = copied
        return copied

    def watched(self, module: nn.Module, cls: type, path: tuple[str, ...] = ()) -> Any:
        """Return a copy of ``module``, of class ``cls``, that records; its children are leaves."""
        if id(module) in self._watched:
            return self._watched[id(module)]
        is_leaf = bool(path) and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        copied = object.__new__(watching_class(cls, is_leaf))
        self._watched[id(module)] = copied
        copied.__dict__.update(vars(module))
        copied.__dict__[WATCH] = (self, path)
        for kind in ("_parameters", "_buffers"):
            tensors = vars(module)[kind]
            copied.__dict__[kind] = {n: self._tensor((*path, n), t) for n, t in tensors.items()}
        copied.__dict__["_modules"] = {
            n: None if m is None else self.watched(m, type(m), (*path, n))
            for n, m in vars(module)["_modules"].items()
        }
        return copied

    def _tensor(self, path: tuple[str, ...], tensor: Tensor | None) -> Any:
        if tensor is None:
            self.reads[path] = Read(path, None)
            return None
        made = Value(self.create_node("get_attr", ".".join(path), (), {}), self)
        made.meta = torch.empty_like(tensor, device="meta", requires_grad=False)
        made.node.meta["example_value"] = made.meta
        return made

    # What does not see a recorded number.

    @contextmanager
    def wrapped_functions(self) -> Iterator[None]:
        """Let functions that take numbers record where one of them is recorded."""

        def wrap(function: Any) -> Any:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                if any_value(args) or any_value(kwargs):
                    return self.create_proxy("call_function", function, args, kwargs)
                return function(*args, **kwargs)

            return recorded

        with self._functions([wrap(function) for function in self._originals]):
            yield

    @contextmanager
    def _functions(self, functions: list[Any]) -> Iterator[None]:
        """Put ``functions`` in the place of those in ``_WRAPPED``."""
        before = _wrapped()
        try:
            for (place, name), function in zip(_WRAPPED, functions, strict=True):
                setattr(place, name, function)
            yield
        finally:
            for (place, name), function in zip(_WRAPPED, before, strict=True):
                setattr(place, name, function)

    def to_bool(self, obj: Any) -> bool:
        if not isinstance(obj.meta, bool):
            raise CannotTrace("its forward branches on a value of its input")
        if self.has_effects and not is_check(sys._getframe(2)):
            raise CannotTrace("its forward branches on a size after it changed something")
        node = self.create_node("call_function", check, (obj.node, obj.meta), {})
        node.meta["pure"] = False
        self.has_branches = True
        return obj.meta

    def iter(self, obj: Proxy) -> Iterator:
        raise CannotTrace("its forward loops over a tensor")


def _user_line() -> str:
    """Return file and line of the code that runs, without torch's and ours."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name.partition(".")[0] != "torch" and not is_ours(frame):
            return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
