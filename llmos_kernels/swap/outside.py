"""What the code of a forward reads from outside of its module: global and closure variables.

``SCALE``, ``settings.SCALE``, ``Config.causal``, a function, a tensor, a variable of the function
that defined the class: a forward that was made from such values holds as long as they are the same.
"""

import dis
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmos_kernels.swap.calls import PLAIN
from llmos_kernels.swap.constants import MISSING, frozen

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
#: Packages whose functions and classes nobody replaces.
_FIXED = frozenset(("torch", "math", "operator", "functools", "itertools", "typing", "builtins"))
#: An object with more attributes than this is compared as a whole.
_MOST_ATTRIBUTES = 64


class Outside(NamedTuple):
    """A value from outside.

    Args:
        holder: the dict of global variables, or the cell of a variable of another function.
        path: the name of the variable and those of the attributes that lead to the value.
        value: what it was: plain data in the form of ``frozen``, or any other object.
        version: of a tensor; None for others.
    """

    holder: Any
    path: tuple[str, ...]
    value: Any
    version: int | None = None

    def holds(self) -> bool:
        """Return True if the value is what it was."""
        try:
            found = _variable(self.holder, self.path[0])
            for name in self.path[1:]:
                found = getattr(found, name)
        except (AttributeError, KeyError, ValueError):
            return False
        if found is self.value:
            return self.version is None or _version(found) == self.version
        if isinstance(found, Tensor):
            return False
        return (type(found) is type(self.value) and bool(found == self.value)) or (
            frozen(found) == self.value
        )


def _variable(holder: Any, name: str) -> Any:
    return holder.cell_contents if isinstance(holder, CellType) else holder[name]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def of_line(
    instructions: Sequence[dis.Instruction],
    code: CodeType,
    variables: dict[str, Any],
    functions: Mapping[CodeType, FunctionType],
) -> Iterator[Outside]:
    """Yield what a line reads from outside.

    Args:
        instructions: those of the line.
        code: its code.
        variables: the global variables of its function.
        functions: the functions that are known, by their code.
    """
    for i, instruction in enumerate(instructions):
        name = instruction.argval
        if instruction.opname == "LOAD_GLOBAL":
            holder: Any = variables
        elif instruction.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and name != "__class__":
            holder = _cell(code, name, functions)
        else:
            continue
        if holder is None or (holder is variables and name not in variables):
            continue  # The code's own variable, or a function of Python.
        path = [name]
        for following in instructions[i + 1 :]:
            if following.opname not in _LOADS:
                break
            path.append(following.argval)
        yield from _along(holder, path)


def _cell(code: CodeType, name: str, functions: Mapping[CodeType, FunctionType]) -> Any:
    """Return the cell of a variable that ``code`` has from the function around it, or None."""
    function = functions.get(code)
    if name not in code.co_freevars or function is None:
        return None
    return (function.__closure__ or ())[code.co_freevars.index(name)]


def _along(holder: Any, path: list[str]) -> Iterator[Outside]:
    """Yield the values on a path that decide what the code computes."""
    try:
        value = _variable(holder, path[0])
    except (KeyError, ValueError):
        return
    depth = 1
    while depth < len(path) and frozen(value) is MISSING and not isinstance(value, Tensor):
        found = inspect.getattr_static(value, path[depth], MISSING)
        if _is_fixed(value) or found is MISSING or isinstance(found, property):
            break
        value = getattr(value, path[depth])
        depth += 1
    reached = tuple(path[:depth])
    data = frozen(value)
    if data is not MISSING:
        yield Outside(holder, reached, data)
        return
    if isinstance(value, Tensor):
        yield Outside(holder, reached, value, _version(value))
        return
    if _is_fixed(value):
        return
    yield Outside(holder, reached, value)
    # Whoever has the object may read any of its plain attributes.
    if isinstance(value, (FunctionType, ModuleType, nn.Module)) or not hasattr(value, "__dict__"):
        return
    attributes = {n: v for n, v in vars(value).items() if not n.startswith("__")}
    if len(attributes) <= _MOST_ATTRIBUTES:
        for name, attribute in attributes.items():
            if frozen(attribute) is not MISSING:
                yield Outside(holder, (*reached, name), frozen(attribute))


@functools.cache
def _is_fixed_package(name: str) -> bool:
    return name.partition(".")[0] in _FIXED


def _is_fixed(value: Any) -> bool:
    """Return True for a package, a function or a class that nobody replaces."""
    if isinstance(value, ModuleType):
        return _is_fixed_package(value.__name__)
    if isinstance(value, (*PLAIN, torch.dtype)):
        return False
    return callable(value) and _is_fixed_package(str(getattr(value, "__module__", "") or ""))
