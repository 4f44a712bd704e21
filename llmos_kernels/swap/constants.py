"""What a forward may branch by: plain data of its module, and what it asks of tensors."""

import dis
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmos_kernels.swap.calls import PLAIN
from llmos_kernels.swap.code import functions_of, has_branches, names_of

#: Names of attributes and their values at the time of a swap; () where there are none.
Constants = tuple[()] | tuple[tuple[str, ...], tuple[Any, ...]]

#: What code may ask of a parameter, to branch by it.
_PARAMETER_STATES = ("dtype", "requires_grad")
#: The value of what is not there, or no plain data.
MISSING = object()


def constants(module: nn.Module) -> Constants:
    """Return what the forward of ``module`` may branch or choose by, with its values.

    These are the attributes that its code names, of the module and of those inside, that hold plain
    data or lists and dicts of it, and, if the code names them, dtype and requires_grad of the
    parameters. ``training`` is not among them. A drop-in that was made for these values holds for
    no others, see ``have_changed``.
    """
    functions = [f for f in functions_of(module) if f]
    instructions = (i for f in functions for i in dis.get_instructions(f))
    chooses = any(i.opname == "BINARY_SUBSCR" or i.argrepr == "[]" for i in instructions)
    if not (chooses or has_branches(module)):
        return ()
    names = sorted({n for f in functions for n in names_of(f)} - {"training"})
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
    if type(value) in (list, tuple, torch.Size):
        items = tuple(map(frozen, value))
    elif type(value) is dict:
        items = tuple((frozen(k), frozen(v)) for k, v in value.items())
    else:
        return MISSING
    return MISSING if _holds_missing(items) else items


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


def _attribute(module: nn.Module, name: str) -> Any:
    """Return the value of an attribute, of the instance or of its class, without running code."""
    return vars(module).get(name, inspect.getattr_static(type(module), name, MISSING))
