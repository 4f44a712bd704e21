"""Inspection of the code of a forward, for side effects that a run does not show.

A fused forward takes the place of one that was watched on a few inputs. It must not lose what that
does besides: an attribute that is set, a list that grows, a printed line, a profiler's range. Nor
may it miss that an attribute by which the code branches has changed since.
"""

import builtins
import dis
import functools
import math
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmos_kernels.swap.calls import PLAIN
from llmos_kernels.swap.code import (
    classes_of,
    definitions_of,
    function_of,
    functions_of,
    has_branches,
    instance_values,
    is_torchs,
    names_of,
)
from llmos_kernels.swap.constants import MISSING

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
    for function in functions_of(module):
        if function is None:
            return True
        if any(not _is_plain(v) for n in names_of(function) for v in instance_values(module, n)):
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
    for function in filter(None, functions_of(module)):
        for name in names_of(function):
            value = function.__globals__.get(name)
            if name in ("input", "open", "print") or isinstance(value, (list, dict, set)):
                return True
    return False


def _is_data(value: Any) -> bool:
    return isinstance(value, (*PLAIN, list, dict))


def _effects(module: nn.Module) -> Iterator[str]:
    branches = has_branches(module)
    for found in functions_of(module):
        if found is None:
            yield "is no plain function"
            return
        names = names_of(found)
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
    defined = [function_of(d) for cls in classes_of(module) for d in definitions_of(cls, name)]
    # The code of methods is looked at itself.
    values = [d for d in defined if not isinstance(d, FunctionType)]
    for value in [*instance_values(module, name), *values]:
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
        bool(instance_values(module, name))
        or any(definitions_of(cls, name) for cls in classes_of(module))
        or any(
            name in members
            for m in module.modules()
            for members in (m._modules, m._parameters, m._buffers)
        )
    )


def _is_plain(value: Any) -> bool:
    """Return True if using ``value``, an attribute, changes nothing but by methods in _CHANGES."""
    if isinstance(value, functools.partial):
        return _is_plain(value.func) and all(map(_is_plain, value.args))
    if isinstance(value, (*PLAIN, Tensor, nn.Module, torch.dtype, torch.device, torch.Size)):
        return True
    if type(value) in (list, tuple, dict):
        return True
    return isinstance(value, MethodType) or (callable(value) and is_torchs(value))


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
