"""The code of a forward: the functions that it is made of, and the names that they use."""

import dis
import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn


def has_branches(module: nn.Module) -> bool:
    """Return True if the forward of ``module``, or a method it calls, has a branch or a loop."""
    instructions = (i for f in functions_of(module) if f for i in dis.get_instructions(f))
    return any("JUMP" in i.opname or i.opname == "FOR_ITER" for i in instructions)


def has_slices(module: nn.Module) -> bool:
    """Return True if the forward of ``module``, or a method it calls, takes a slice."""
    instructions = (i for f in functions_of(module) if f for i in dis.get_instructions(f))
    return any("SLICE" in i.opname or isinstance(i.argval, slice) for i in instructions)


def names_in(module: nn.Module) -> set[str]:
    """Return the names that the forward of ``module`` and the methods it calls use."""
    return {n for f in functions_of(module) if f for n in names_of(f)}


def functions_of(module: nn.Module) -> Iterator[FunctionType | None]:
    """Yield the forward of ``module`` and what it calls of its own; None for what is no function.

    Those are functions and methods of its class and of the classes of the modules inside that the
    code names, but for their forwards.
    """
    classes = classes_of(module)
    seen: set[CodeType] = set()

    def follow(function: Any) -> Iterator[FunctionType | None]:
        if not isinstance(function, FunctionType):
            yield None
            return
        if function.__code__ in seen:
            return
        seen.add(function.__code__)
        yield function
        for name in names_of(function):
            for cls in classes[:1] if name == "forward" else classes:
                for found in map(function_of, definitions_of(cls, name)):
                    if isinstance(found, FunctionType):
                        yield from follow(found)
            for value in instance_values(module, name):
                if isinstance(value, MethodType) and not is_torchs(value):
                    yield from follow(value.__func__)

    cls: Any = type(module)
    yield from follow(cls.forward)


def names_of(function: FunctionType) -> list[str]:
    """Return the names that the code of ``function`` uses, also those in strings for ``getattr``.

    A name that holds no attribute is harmless here.
    """
    code = function.__code__
    strings = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return list(dict.fromkeys([*code.co_names, *strings]))


def definitions_of(cls: type, name: str) -> list[Any]:
    """Return what ``cls`` and its bases define under ``name``, but for torch's classes."""
    users = (c for c in cls.__mro__ if c is not object and not is_torchs(c))
    return [vars(c)[name] for c in users if name in vars(c)]


def function_of(found: Any) -> Any:
    """Return the function behind a method or property of a class."""
    if isinstance(found, property):
        return found.fget
    if isinstance(found, (staticmethod, classmethod)):
        return found.__func__
    return found.func if isinstance(found, functools.cached_property) else found


def instance_values(module: nn.Module, name: str) -> list[Any]:
    """Return the values of an attribute ``name`` of ``module`` and of the modules inside."""
    return [vars(m)[name] for m in module.modules() if name in vars(m)]


def classes_of(module: nn.Module) -> list[type]:
    """Return the classes of ``module`` and of the modules inside; its own is the first."""
    return list(dict.fromkeys(type(m) for m in module.modules()))


def is_torchs(value: Any) -> bool:
    """Return True if a class or function is one of torch's, or of ``math``."""
    return (getattr(value, "__module__", None) or "").split(".")[0] in ("torch", "math")
