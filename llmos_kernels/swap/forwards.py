"""Inspection of the code of a forward, for side effects and branches that a run does not show.

A fused forward takes the place of one that was watched on a few inputs. It must not lose what that
does besides: an attribute that is set, a list that grows, a printed line, a profiler's range. Nor
may it miss that an attribute by which the code branches has changed since.
"""

import builtins
import dis
import functools
import inspect
import math
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmos_kernels.swap.calls import PLAIN

#: Names of attributes and their values at the time of a swap.
Constants = tuple[tuple[str, Any], ...]

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
        *("__delattr__", "__setattr__", "__setitem__", "add_module", "append", "appendleft"),
        *("clear", "extend", "insert", "pop", "popitem", "register_buffer", "register_parameter"),
        *("remove", "reverse", "setdefault", "sort", "update", "write"),
    )
)
#: Functions of torch that return a state by which a forward may branch, unseen by a watcher.
_STATES = frozenset(
    (
        *("get_autocast_dtype", "get_default_dtype", "is_anomaly_enabled", "is_autocast_enabled"),
        *("is_deterministic", "is_grad_enabled", "is_inference_mode_enabled"),
    )
)
#: Where the names of attributes and methods without an effect come from, besides the module's own.
_PURE = (torch, F, nn, nn.Module, Tensor, math, torch.dtype, list, dict, tuple, str)
_LOADS_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
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
    than torch counts as one that has, and so does one that uses an object of another class.

    Args:
        module: a module whose class defines ``forward`` in Python.

    Returns:
        A verb and its object, such as "sets an attribute (hidden)".
    """
    return next(_effects(module), "")


def has_branches(module: nn.Module) -> bool:
    """Return True if the forward of ``module``, or a method it calls, has a branch or a loop."""
    instructions = (i for f in _functions(module) if f for i in dis.get_instructions(f))
    return any("JUMP" in i.opname or i.opname == "FOR_ITER" for i in instructions)


def constants(module: nn.Module) -> Constants:
    """Return the plain attributes that the forward of ``module`` may branch by, with their values.

    ``training`` is not among them. A drop-in that was made for these values holds for no others,
    see ``have_changed``.
    """
    if not has_branches(module):
        return ()
    names = sorted({n for f in _functions(module) if f for n in _names(f)} - {"training"})
    values = ((n, _attribute(module, n)) for n in names)
    return tuple((n, v) for n, v in values if isinstance(v, PLAIN))


def have_changed(module: nn.Module, then: Constants) -> bool:
    """Return True if an attribute of ``module`` has another value than it had ``then``."""
    return any(getattr(module, name, _MISSING) != value for name, value in then)


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


_MISSING = object()


def _functions(module: nn.Module) -> Iterator[FunctionType | None]:
    """Yield the forward of ``module`` and what it calls of its own; None for what is no function.

    Those are functions and methods of its class and of the classes of the modules inside that the
    code names, but for their forwards.
    """
    classes = _classes(module)
    seen: set[CodeType] = set()

    def follow(function: Any) -> Iterator[FunctionType | None]:
        if not isinstance(function, FunctionType):
            yield None
            return
        if function.__code__ in seen:
            return
        seen.add(function.__code__)
        yield function
        for name in _names(function):
            for cls in classes[:1] if name == "forward" else classes:
                for found in map(_function_of, _definitions(cls, name)):
                    if isinstance(found, FunctionType):
                        yield from follow(found)
            for value in _instance_values(module, name):
                if isinstance(value, MethodType) and not _is_torchs(value):
                    yield from follow(value.__func__)

    cls: Any = type(module)
    yield from follow(cls.forward)


def _names(function: FunctionType) -> list[str]:
    """Return the names that the code of ``function`` uses, also those in strings for ``getattr``.

    A name that holds no attribute is harmless here.
    """
    code = function.__code__
    strings = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return list(dict.fromkeys([*code.co_names, *strings]))


def _definitions(cls: type, name: str) -> list[Any]:
    """Return what ``cls`` and its bases define under ``name``, but for torch's classes."""
    users = (c for c in cls.__mro__ if c is not object and not _is_torchs(c))
    return [vars(c)[name] for c in users if name in vars(c)]


def _function_of(found: Any) -> Any:
    """Return the function behind a method or property of a class."""
    if isinstance(found, property):
        return found.fget
    if isinstance(found, (staticmethod, classmethod)):
        return found.__func__
    return found.func if isinstance(found, functools.cached_property) else found


def _instance_values(module: nn.Module, name: str) -> list[Any]:
    """Return the values of an attribute ``name`` of ``module`` and of the modules inside."""
    return [vars(m)[name] for m in module.modules() if name in vars(m)]


def _attribute(module: nn.Module, name: str) -> Any:
    """Return the value of an attribute, of the instance or of its class, without running code."""
    return vars(module).get(name, inspect.getattr_static(type(module), name, _MISSING))


def _effects(module: nn.Module) -> Iterator[str]:
    for found in _functions(module):
        if found is None:
            yield "is no plain function"
            return
        for name in _names(found):
            yield from _effects_of_attribute(module, name)
        for instruction in dis.get_instructions(found.__code__):
            name, value = instruction.opname, instruction.argval
            if name in _EFFECTS:
                yield f"{_EFFECTS[name]} ({value})" if isinstance(value, str) else _EFFECTS[name]
            elif name in _LOADS_ATTRIBUTE:
                if value in _CHANGES or not _is_known(module, value):
                    yield f"calls {value}" if value in _CHANGES else f"uses {value}"
            elif name == "LOAD_GLOBAL":
                if not _is_harmless(found, value):
                    yield f"uses {value}"
            elif name in ("LOAD_DEREF", "LOAD_CLASSDEREF") and value != "__class__":
                yield f"uses {value} of another function"
            elif isinstance(value, CodeType):
                yield "defines a function"


def _effects_of_attribute(module: nn.Module, name: str) -> Iterator[str]:
    """Yield what using an attribute ``name`` of ``module``, or of a module inside, may do."""
    if name in _STATES:
        yield f"asks for {name}"
    defined = [_function_of(d) for cls in _classes(module) for d in _definitions(cls, name)]
    # The code of methods is looked at itself.
    values = [d for d in defined if not isinstance(d, FunctionType)]
    for value in [*_instance_values(module, name), *values]:
        if not _is_plain(value):
            yield f"uses {name}, a {type(value).__name__}"


def _is_known(module: nn.Module, name: str) -> bool:
    """Return True if ``name`` is an attribute of ``module``, of a module inside, or of torch."""
    return (
        any(hasattr(place, name) for place in _PURE)
        or bool(_instance_values(module, name))
        or any(_definitions(cls, name) for cls in _classes(module))
        or any(
            name in members
            for m in module.modules()
            for members in (m._modules, m._parameters, m._buffers)
        )
    )


def _classes(module: nn.Module) -> list[type]:
    """Return the classes of ``module`` and of the modules inside; its own is the first."""
    return list(dict.fromkeys(type(m) for m in module.modules()))


def _is_plain(value: Any) -> bool:
    """Return True if using ``value``, an attribute, changes nothing but by methods in _CHANGES."""
    if isinstance(value, functools.partial):
        return _is_plain(value.func) and all(map(_is_plain, value.args))
    if isinstance(value, (*PLAIN, Tensor, nn.Module, torch.dtype, torch.device, torch.Size)):
        return True
    if type(value) in (list, tuple, dict):
        return True
    return isinstance(value, MethodType) or (callable(value) and _is_torchs(value))


def _is_torchs(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").split(".")[0] in ("torch", "math")


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
