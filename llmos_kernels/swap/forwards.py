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
import operator
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmos_kernels.swap.calls import PLAIN

#: Names of attributes and their values at the time of a swap; () where there are none.
Constants = tuple[()] | tuple[tuple[str, ...], tuple[Any, ...]]

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
        *("clear", "eval", "extend", "insert", "load_state_dict", "pop", "popitem"),
        *("register_buffer", "register_parameter", "remove", "reverse", "setdefault", "sort"),
        *("train", "update", "write", "zero_grad"),
    )
)
#: Functions of torch that change a file, a generator or a setting.
_IMPURE = frozenset(
    (
        *("bernoulli", "load", "manual_seed", "multinomial", "normal", "rand", "rand_like"),
        *("randint", "randint_like", "randn", "randn_like", "randperm", "save", "seed"),
        *("set_default_device", "set_default_dtype", "set_grad_enabled", "set_num_threads"),
    )
)
#: Functions of torch that return a state by which a forward may branch, unseen by a watcher.
STATES = frozenset(
    (
        *("get_autocast_dtype", "get_default_dtype", "is_anomaly_enabled", "is_autocast_enabled"),
        *("is_deterministic", "is_grad_enabled", "is_inference_mode_enabled"),
    )
)
#: What code may ask of its input that a drop-in does not compare.
_UNSEEN = frozenset(("Parameter", "device", "is_cpu", "is_cuda", "is_meta"))
#: What code may ask of a parameter, to branch by it.
_PARAMETER_STATES = ("dtype", "requires_grad")
#: Where the names of attributes and methods without an effect come from, besides the module's own.
_PURE = (torch, F, nn, nn.Module, Tensor, math, torch.dtype, list, dict, tuple, str)
_LOADS_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
#: Instructions that change something else than a local variable, or run code when a block ends.
EFFECTS = {
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


def may_have_effects(module: nn.Module) -> bool:
    """Return True if a line of the forward of ``module``, or of a method it calls, has an effect.

    Less strict than ``side_effect``: the code may define functions and generators, which are looked
    at, too.
    """
    for function in _functions(module):
        if function is None:
            return True
        if any(not _is_plain(v) for n in _names(function) for v in _instance_values(module, n)):
            return True
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [c for c in code.co_consts if isinstance(c, CodeType)]
            for instruction in dis.get_instructions(code):
                name, value = instruction.opname, instruction.argval
                if name in EFFECTS and name not in ("YIELD_VALUE", "STORE_DEREF"):
                    return True
                if name.startswith("INPLACE_") or (
                    name == "BINARY_OP" and "=" in instruction.argrepr
                ):
                    return True
                if name in _LOADS_ATTRIBUTE and changes(value):
                    return True
                if name == "LOAD_GLOBAL" and not _is_harmless(function, value):
                    return True
        constants_of_code = function.__code__.co_consts
        if any("out" in c for c in constants_of_code if isinstance(c, tuple)):
            return True
        strings = (c for c in constants_of_code if isinstance(c, str))
        if {"getattr", "hasattr"} & {*function.__code__.co_names} and any(map(changes, strings)):
            return True
    return False


def reaches_outside(module: nn.Module) -> bool:
    """Return True if the forward of ``module`` names something that others may see it change.

    That is a list or dict of its Python module, or what prints or opens files.
    """
    for function in filter(None, _functions(module)):
        for name in _names(function):
            value = function.__globals__.get(name)
            if name in ("input", "open", "print") or isinstance(value, (list, dict, set)):
                return True
    return False


def has_branches(module: nn.Module) -> bool:
    """Return True if the forward of ``module``, or a method it calls, has a branch or a loop."""
    instructions = (i for f in _functions(module) if f for i in dis.get_instructions(f))
    return any("JUMP" in i.opname or i.opname == "FOR_ITER" for i in instructions)


def has_slices(module: nn.Module) -> bool:
    """Return True if the forward of ``module``, or a method it calls, takes a slice."""
    instructions = (i for f in _functions(module) if f for i in dis.get_instructions(f))
    return any("SLICE" in i.opname or isinstance(i.argval, slice) for i in instructions)


def names_in(module: nn.Module) -> set[str]:
    """Return the names that the forward of ``module`` and the methods it calls use."""
    return {n for f in _functions(module) if f for n in _names(f)}


def constants(module: nn.Module) -> Constants:
    """Return what the forward of ``module`` may branch or choose by, with its values.

    These are the attributes that its code names, of the module and of those inside, that hold plain
    data or lists and dicts of it, and, if the code names them, dtype and requires_grad of the
    parameters. ``training`` is not among them. A drop-in that was made for these values holds for
    no others, see ``have_changed``.
    """
    functions = [f for f in _functions(module) if f]
    instructions = (i for f in functions for i in dis.get_instructions(f))
    chooses = any(i.opname == "BINARY_SUBSCR" or i.argrepr == "[]" for i in instructions)
    if not (chooses or has_branches(module)):
        return ()
    names = sorted({n for f in functions for n in _names(f)} - {"training"})
    found = []
    for place, part in module.named_modules():
        prefix = f"{place}." if place else ""
        values = ((n, frozen(_attribute(part, n))) for n in names)
        found += [(prefix + n, v) for n, v in values if v is not MISSING]
    for place, p in module.named_parameters():
        states = ((f"{place}.{n}", getattr(p, n)) for n in _PARAMETER_STATES if n in names)
        found += states
    return tuple(zip(*found, strict=True))  # type: ignore[return-value]


def have_changed(module: nn.Module, then: Constants) -> bool:
    """Return True if an attribute of ``module`` has another value than it had ``then``."""
    if not then:
        return False
    names, values = then
    try:
        found = _read(module, names)
    except AttributeError:
        return True
    return found != values and tuple(map(frozen, found)) != values


def _read(module: nn.Module, names: tuple[str, ...]) -> tuple:
    if torch.compiler.is_compiling():  # torch.compile cannot follow an attrgetter made elsewhere
        return tuple(functools.reduce(getattr, n.split("."), module) for n in names)
    found = _reader(names)(module)
    return found if len(names) > 1 else (found,)


@functools.cache
def _reader(names: tuple[str, ...]) -> Callable[[Any], Any]:
    return operator.attrgetter(*names)


def frozen(value: Any) -> Any:
    """Return plain data in a form that can be hashed and does not change; MISSING for others."""
    if isinstance(value, (*PLAIN, torch.dtype, torch.device)):
        return value
    if type(value) in (list, tuple):
        items = tuple(map(frozen, value))
    elif type(value) is dict:
        items = tuple((frozen(k), frozen(v)) for k, v in value.items())
    else:
        return MISSING
    return MISSING if _holds_missing(items) else items


def _is_data(value: Any) -> bool:
    return isinstance(value, (*PLAIN, list, dict))


def _holds_missing(items: tuple) -> bool:
    return any(i is MISSING or (isinstance(i, tuple) and MISSING in i) for i in items)


class Reads(TorchFunctionMode):
    """Records what code asks of tensors that are no parameters, other than to compute with them.

    Such a read, of a shape or a value, may decide what the code does. Reads of dtype and device are
    left out: ``constants`` has the dtype, and ``side_effect`` tells of branches on the device.
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


MISSING = object()


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
    return vars(module).get(name, inspect.getattr_static(type(module), name, MISSING))


def _effects(module: nn.Module) -> Iterator[str]:
    branches = has_branches(module)
    for found in _functions(module):
        if found is None:
            yield "is no plain function"
            return
        names = _names(found)
        for name in names:
            yield from _effects_of_attribute(module, name)
        yield from _effects_of_strings(module, found)
        for name in _UNSEEN & {*names} if branches else ():
            yield f"branches, and asks for {name}"
        for instruction in dis.get_instructions(found.__code__):
            name, value = instruction.opname, instruction.argval
            if name in EFFECTS:
                yield f"{EFFECTS[name]} ({value})" if isinstance(value, str) else EFFECTS[name]
            elif name.startswith("INPLACE_") or (
                name == "BINARY_OP" and "=" in instruction.argrepr
            ):
                yield f"changes a value in place ({instruction.argrepr or name})"
            elif name in _LOADS_ATTRIBUTE:
                if changes(value):
                    yield f"calls {value}"
                elif not _is_known(module, value):
                    yield f"uses {value}"
            elif name == "LOAD_GLOBAL":
                if not _is_harmless(found, value):
                    yield f"uses {value}"
                elif branches and _is_data(found.__globals__.get(value, MISSING)):
                    yield f"branches, and uses the global variable {value}"
            elif name in ("LOAD_DEREF", "LOAD_CLASSDEREF") and value != "__class__":
                yield f"uses {value} of another function"
            elif isinstance(value, CodeType):
                yield "defines a function"


def _effects_of_attribute(module: nn.Module, name: str) -> Iterator[str]:
    """Yield what using an attribute ``name`` of ``module``, or of a module inside, may do."""
    if name in STATES:
        yield f"asks for {name}"
    defined = [_function_of(d) for cls in _classes(module) for d in _definitions(cls, name)]
    # The code of methods is looked at itself.
    values = [d for d in defined if not isinstance(d, FunctionType)]
    for value in [*_instance_values(module, name), *values]:
        if not _is_plain(value):
            yield f"uses {name}, a {type(value).__name__}"


def changes(name: str) -> bool:
    """Return True if a method or function ``name`` changes its object, or something global.

    The methods of tensors that change them end in "_".
    """
    in_place = name.endswith("_") and not name.startswith("_") and hasattr(Tensor, name)
    return in_place or name in _CHANGES or name in _IMPURE


def _effects_of_strings(module: nn.Module, function: FunctionType) -> Iterator[str]:
    """Yield what names in strings do: those for ``getattr``, and of keyword arguments."""
    code = function.__code__
    if any("out" in c for c in code.co_consts if isinstance(c, tuple)):
        yield "writes to an argument (out=)"
    if not {"getattr", "hasattr"} & {*code.co_names}:
        return
    strings = {c for c in code.co_consts if isinstance(c, str)} - {function.__doc__}
    for name in filter(str.isidentifier, strings):
        of_torch = hasattr(Tensor, name) or hasattr(nn.Module, name)
        if changes(name) or not (of_torch or _has(module, name)):
            yield f"uses {name} by its name"


def _is_known(module: nn.Module, name: str) -> bool:
    """Return True if ``name`` is an attribute of ``module``, of a module inside, or of torch."""
    return any(hasattr(place, name) for place in _PURE) or _has(module, name)


def _has(module: nn.Module, name: str) -> bool:
    """Return True if ``name`` is an attribute of ``module`` or of a module inside."""
    return (
        bool(_instance_values(module, name))
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
