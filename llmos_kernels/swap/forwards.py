"""What the code of a forward shows that running a copy cannot: side effects, and branches.

A fused forward takes the place of one that was watched on a few inputs. It must not lose what that
does besides: an attribute that is set, a list that grows, a printed line, a profiler's range.
"""

import builtins
import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_BUILTINS = frozenset(
    (
        *("abs", "all", "any", "bool", "enumerate", "float", "getattr", "hasattr", "int"),
        *("isinstance", "issubclass", "len", "list", "max", "min", "range", "reversed", "round"),
        *("slice", "str", "sum", "super", "tuple", "type", "zip"),
    )
)
#: Functions of other libraries that only pass a tensor on.
_KNOWN = frozenset({("transformers.pytorch_utils", "apply_chunking_to_forward")})
#: Methods that change the object that they are called on. Those of tensors end in "_".
_CHANGES = frozenset(
    (
        *("add_module", "append", "clear", "extend", "insert", "pop", "popitem", "register_buffer"),
        *("register_parameter", "remove", "setdefault", "update", "write"),
    )
)
#: Instructions that change something else than a local variable, or run code when a block ends.
_EFFECTS = {
    "BEFORE_WITH": "has a with block",
    "DELETE_ATTR": "deletes an attribute",
    "DELETE_GLOBAL": "changes a global variable",
    "DELETE_SUBSCR": "changes an element",
    "IMPORT_NAME": "imports a module",
    "LOAD_SPECIAL": "has a with block",
    "SETUP_WITH": "has a with block",
    "STORE_ATTR": "sets an attribute",
    "STORE_DEREF": "sets a variable of another function",
    "STORE_GLOBAL": "changes a global variable",
    "STORE_SLICE": "changes elements",
    "STORE_SUBSCR": "changes an element",
    "YIELD_VALUE": "yields",
}


def side_effect(module: nn.Module) -> str:
    """Return what the forward of ``module`` does besides returning a tensor, or an empty string.

    Only code that could not have an effect passes: a forward that calls functions of modules other
    than torch counts as one that has.

    Args:
        module: a module whose class defines ``forward`` in Python.

    Returns:
        A verb and its object, such as "sets an attribute (hidden)".
    """
    cls = type(module)
    return next(_effects(cls.forward, cls), "")


def has_branches(module: nn.Module) -> bool:
    """Return True if the forward of ``module``, or a method it calls, has a branch or a loop."""
    cls = type(module)
    functions = [f for f in _functions(cls.forward, cls, set()) if f is not None]
    instructions = (i for f in functions for i in dis.get_instructions(f))
    return any("JUMP" in i.opname or i.opname == "FOR_ITER" for i in instructions)


class Reads(TorchFunctionMode):
    """Records what code asks of tensors that are no parameters, other than to compute with them.

    Such a read, of a shape or a value, may decide what the code does. Reads of dtype and device are
    left out: a drop-in can compare them at each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.any_read = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        computes = all(isinstance(t, Tensor) for t in tensors)
        self.any_read |= not computes and not is_harmless_read(func, args)
        return result


def is_harmless_read(func: Any, args: tuple) -> bool:
    """Return True if a call of torch reads a dtype or device, or any attribute of a parameter."""
    if getattr(func, "__name__", "") != "__get__":
        return False
    return isinstance(args[0], nn.Parameter) or func.__self__.__name__ in ("dtype", "device")


def _functions(function: Any, cls: type, seen: set[CodeType]) -> Iterator[FunctionType | None]:
    """Yield a function and the methods of ``cls`` that it names; None for what is no function."""
    if not isinstance(function, FunctionType):
        yield None
        return
    if function.__code__ in seen:
        return
    seen.add(function.__code__)
    yield function
    for name in function.__code__.co_names:
        found = inspect.getattr_static(cls, name, None)
        if isinstance(found, property):
            found = found.fget
        is_torchs = getattr(found, "__module__", "").split(".")[0] == "torch"
        if isinstance(found, FunctionType) and not is_torchs:
            yield from _functions(found, cls, seen)


def _effects(function: Any, cls: type) -> Iterator[str]:
    for found in _functions(function, cls, set()):
        if found is None:
            yield "is no plain function"
            return
        for instruction in dis.get_instructions(found.__code__):
            name, value = instruction.opname, instruction.argval
            if name in _EFFECTS:
                yield f"{_EFFECTS[name]} ({value})" if isinstance(value, str) else _EFFECTS[name]
            elif name in ("LOAD_ATTR", "LOAD_METHOD") and value in _CHANGES:
                yield f"calls {value}"
            elif name == "LOAD_GLOBAL" and not _is_harmless(found, value):
                yield f"uses {value}"
            elif name in ("LOAD_DEREF", "LOAD_CLASSDEREF") and value != "__class__":
                yield f"uses {value} of another function"
            elif isinstance(value, CodeType):
                yield "defines a function"


def _is_harmless(function: FunctionType, name: str) -> bool:
    """Return True if the global ``name`` of ``function`` is a value, or has no effects."""
    if name not in function.__globals__:
        return name in _BUILTINS and hasattr(builtins, name)
    value = function.__globals__[name]
    if isinstance(value, (bool, int, float, str, type(None))):
        return True
    if isinstance(value, ModuleType):
        return value.__name__.split(".")[0] in ("torch", "math")
    place = getattr(value, "__module__", None) or ""
    return place.split(".")[0] in ("torch", "math") or (place, name) in _KNOWN
