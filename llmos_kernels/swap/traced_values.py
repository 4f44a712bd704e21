"""What a forward computes while it is traced: values that record what is done with them."""

import copy
import dis
import inspect
import math
import operator
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node, Proxy

UNKNOWN = object()
#: What a tensor tells of itself beside its sizes.
_FACTS = frozenset(
    (
        *("device", "dtype", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_nested", "is_sparse"),
        *("layout", "ndim"),
    )
)
#: Methods that tell such facts.
_FACT_METHODS = frozenset(("dim", "element_size", "is_complex", "is_floating_point", "ndimension"))
#: What depends on the numbers in a tensor, or on how it is used.
_VALUES = frozenset(
    (
        *("backward", "cpu", "cuda", "data", "data_ptr", "detach_", "equal", "grad", "grad_fn"),
        *("is_contiguous", "is_leaf", "item", "numpy", "register_hook", "requires_grad"),
        *("requires_grad_", "retain_grad", "storage", "stride", "tolist", "untyped_storage"),
    )
)


class CannotTrace(Exception):
    """Says why a forward cannot be traced, and what it had read by then."""

    reads: tuple["Read", ...] = ()


class Mismatch(Exception):
    """A condition on sizes is another one than when a graph was traced."""


def check(condition: Any, expected: bool) -> None:
    """Raise Mismatch unless ``condition`` is what it was when the graph was traced."""
    if bool(condition) is not expected:
        raise Mismatch


def kinds_of(result: Any) -> Any:
    """Return which parts of the result of a module are tensors, None or other things."""
    if isinstance(result, (tuple, list)):
        return tuple(map(kinds_of, result))
    return "tensor" if isinstance(result, Tensor) else "none" if result is None else "other"


def check_kinds(result: Any, expected: Any) -> None:
    """Raise Mismatch unless the parts of ``result`` are as when the graph was traced."""
    if kinds_of(result) != expected:
        raise Mismatch


def is_check(frame: FrameType | None) -> bool:
    """Return True if the branch at which ``frame`` is only raises an error."""
    if frame is None:
        return False
    later = [i.opname for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti]
    jump = next((i for i, name in enumerate(later) if "POP_JUMP" in name), len(later))
    for name in later[jump + 1 :]:
        if name in ("RAISE_VARARGS", "LOAD_ASSERTION_ERROR"):
            return True
        if name.startswith(("STORE", "RETURN")) or "JUMP" in name:
            return False
    return False


class Read(NamedTuple):
    """An attribute that a forward has read.

    Args:
        path: the names that lead to it from the module.
        value: what it was; for what is no plain data, the object itself.
    """

    path: tuple[str, ...]
    value: Any


class Slot(NamedTuple):
    """Stands for an input of a graph among the arguments of a forward.

    Args:
        name: the name of the argument.
        place: which of the inputs it is.
    """

    name: str
    place: int


class Opaque(NamedTuple):
    """An argument that is neither tensor nor plain data, of which methods may be called.

    Args:
        cls: its class.
        example: such an object.
    """

    cls: type
    example: Any = None


class Value(Proxy):
    """A node of the graph, with what it is on the meta device: a tensor, a number or a tuple."""

    tracer: Any

    def __init__(self, node: Node, tracer: Any = None) -> None:
        super().__init__(node, tracer)
        self.meta: Any = UNKNOWN

    @property
    def __class__(self) -> Any:
        # Not that of a tensor: C++ would take it for one.
        meta = self.__dict__.get("meta", UNKNOWN)
        return meta.cls if isinstance(meta, Opaque) else type(self)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise CannotTrace("its forward changes a class")

    def __getattr__(self, name: str) -> Any:
        meta = self.__dict__.get("meta", UNKNOWN)
        if not isinstance(meta, Tensor):
            return AttributeValue(self, name)
        if name == "shape":
            return Shape.of(self, meta)
        if name in _FACTS:
            return self.tracer.fact(self.node, name, meta)
        if name in _VALUES:
            raise CannotTrace(f"its forward uses {name} of a tensor")
        if name == "size":
            return lambda dim=None: self.shape if dim is None else self.shape[dim]
        if name in _FACT_METHODS:
            return lambda: getattr(meta, name)()
        return AttributeValue(self, name)

    def __getitem__(self, index: Any) -> Any:
        made = self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        return None if made.meta is None else made  # A part of what a module returns.

    def __len__(self) -> int:
        meta = self.meta
        if isinstance(meta, tuple):
            return len(meta)
        raise CannotTrace("its forward uses the length of a tensor")

    def __iter__(self) -> Iterator:
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        code = [] if caller is None else dis.get_instructions(caller.f_code)
        found = next((i for i in code if caller and i.offset == caller.f_lasti), None)
        if found is not None and found.opname == "UNPACK_SEQUENCE":
            return (self[i] for i in range(found.argval))
        is_fixed = self.node.op == "call_module" or self.node.target in ("chunk", torch.chunk)
        if isinstance(self.meta, tuple) and is_fixed:
            return (self[i] for i in range(len(self.meta)))
        return self.tracer.iter(self)

    def __index__(self) -> int:
        raise CannotTrace("its forward needs the value of a size")

    __int__ = __float__ = __index__

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.in_place(operator.iadd, self, other)

    def __isub__(self, other: Any) -> Any:
        return self.tracer.in_place(operator.isub, self, other)

    def __imul__(self, other: Any) -> Any:
        return self.tracer.in_place(operator.imul, self, other)

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.in_place(operator.itruediv, self, other)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise CannotTrace("its forward changes elements of a tensor")

    def __contains__(self, value: Any) -> bool:
        raise CannotTrace("its forward looks for a value in a tensor")


class AttributeValue(Value):
    """An attribute of a value, which becomes a node where it is not called as a method."""

    def __init__(self, root: Value, name: str) -> None:
        self.root, self.attr, self.tracer = root, name, root.tracer
        self._node: Node | None = None
        self.meta: Any = UNKNOWN
        if isinstance(root.meta, Opaque):
            self.meta = Opaque(object)
        elif isinstance(root.meta, Tensor):
            try:
                self.meta = detached(getattr(root.meta, name))
            except Exception:
                self.meta = UNKNOWN

    @property
    def node(self) -> Node:  # type: ignore[override]
        if self._node is None:
            args = (self.root, self.attr)
            self._node = self.tracer.create_proxy("call_function", getattr, args, {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class Shape(tuple):
    """The sizes of a tensor, of which each is a value of the graph."""

    @classmethod
    def of(cls, tensor: Value, meta: Tensor) -> "Shape":
        """Return the shape of ``tensor``. A size that a parameter or a constant has is a number."""
        if tensor.node.op == "get_attr":
            path = (*str(tensor.node.target).split("."), "shape")
            tensor.tracer.reads[path] = Read(path, meta.shape)
            return cls(meta.shape)
        return cls(_size(tensor, i, n) for i, n in enumerate(meta.shape))

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Shape(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Any:
        return Shape((*self, *other))

    def __radd__(self, other: Any) -> Any:
        return Shape((*other, *self))

    def numel(self) -> Any:
        """Return the product of all sizes."""
        return math.prod(self)


def _size(tensor: Value, i: int, hint: int) -> Value:
    made = tensor.tracer.create_proxy("call_method", "size", (tensor, i), {})
    made.meta = hint
    return made


def any_value(given: Any) -> bool:
    if isinstance(given, dict):
        given = tuple(given.values())
    if type(given) in (tuple, list, Shape):
        return any(map(any_value, given))
    return type(given) in (Value, AttributeValue)


def metas(given: Any) -> Any:
    """Return arguments with what they are on the meta device."""
    if type(given) in (Value, AttributeValue):
        if isinstance(given.meta, Opaque) and given.meta.example is not None:
            return copy.deepcopy(given.meta.example)
        if given.meta is UNKNOWN or isinstance(given.meta, Opaque):
            raise CannotTrace("unknown")
        return given.meta
    if isinstance(given, (tuple, list)):
        return tuple(map(metas, given)) if type(given) is not list else [*map(metas, given)]
    if isinstance(given, dict):
        return {k: metas(v) for k, v in given.items()}
    if isinstance(given, slice):
        return slice(*map(metas, (given.start, given.stop, given.step)))
    if isinstance(given, Tensor):
        return given.detach().to("meta")
    return torch.device("meta") if isinstance(given, torch.device) else given


def detached(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach() if result.is_meta else result.detach().to("meta")
    if isinstance(result, (tuple, list)):
        return tuple(map(detached, result))
    return result
