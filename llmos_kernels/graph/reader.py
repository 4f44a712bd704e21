"""A graph as patterns read it: operations, numbers that are constant, and the order of nodes."""

import functools
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from llmos_kernels.graph.vocabulary import ModuleRef, Op, operation

#: Functions and methods that may be computed while a graph is read, where their arguments are
#: constant.
_FOLDED: frozenset[Any] = frozenset(
    (
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv),
        *(operator.neg, operator.pow, math.sqrt, float, int, getattr, torch.finfo),
        *(torch.tensor, torch.sqrt, torch.rsqrt, torch.pow, torch.mul, torch.div),
        *("sqrt", "rsqrt", "pow", "item", "mul", "div", "reciprocal"),
    )
)
_MAX_DEPTH = 16
#: A number that is added to a logit, or takes its place, to hide a key. Further from 0 than any
#: difference of logits whose exponential is not 0 in float32.
_HIDES = -1e4
_NOT_CONSTANT = object()


class NoMatch(Exception):
    """Says why what looks like a pattern is not one."""


class Reader:
    """Reads a graph for patterns.

    Args:
        graph: the graph.
        module_at: returns the module that a "call_module" node calls, by its target.
        activation_of: returns the name of the activation that a module computes, or None.
        constant_at: returns the tensor of a "get_attr" node if it is constant, else None.
        module_writes: says of a module whether calling it may change a tensor in place.
    """

    def __init__(
        self,
        graph: torch.fx.Graph,
        module_at: Callable[[str], nn.Module | None],
        activation_of: Callable[[nn.Module], str | None],
        constant_at: Callable[[Node], Tensor | None] = lambda node: None,
        module_writes: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        self.graph = graph
        self._module_writes = module_writes or _module_writes
        self._module_at, self._activation_of = module_at, activation_of
        self._constant_at = constant_at
        self._ops: dict[Node, Op | None] = {}
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def op(self, node: Any, *kinds: str) -> Op | None:
        """Return the operation of ``node``; None if there are ``kinds`` and it is of none."""
        if not isinstance(node, Node):
            return None
        if node not in self._ops:
            module = self._module_at(str(node.target)) if node.op == "call_module" else None
            activation = None if module is None else self._activation_of(module)
            self._ops[node] = operation(node, module, activation)
        found = self._ops[node]
        return found if found is None or not kinds or found.kind in kinds else None

    def module(self, ref: ModuleRef) -> nn.Module | None:
        """Return the module that ``ref`` names."""
        return self._module_at(ref.target)

    def constant(self, value: Any, depth: int = _MAX_DEPTH) -> Any:
        """Return the number or tensor that ``value`` always is, or ``_NOT_CONSTANT``."""
        if not isinstance(value, Node):
            return value
        known = self._constant_at(value)
        if known is not None:
            return known
        if depth == 0 or value.target not in _FOLDED or value.kwargs.get("device") is not None:
            return _NOT_CONSTANT
        args = [self.constant(a, depth - 1) for a in value.args]
        kwargs = {k: self.constant(a, depth - 1) for k, a in value.kwargs.items()}
        if any(a is _NOT_CONSTANT for a in (*args, *kwargs.values())):
            return _NOT_CONSTANT
        target: Any = value.target
        try:
            if value.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)
        except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError):
            return _NOT_CONSTANT

    def writes(self, node: Node) -> bool:
        """Return True if ``node`` may change a tensor in place."""
        if node.op != "call_module":
            return writes(node)
        module = self._module_at(str(node.target))
        return module is None or self._module_writes(module)

    def number(self, value: Any) -> float | None:
        """Return ``value`` as a number if it is one, or a tensor of one, that is constant."""
        found = self.constant(value)
        if isinstance(found, bool):
            return None
        if isinstance(found, (int, float)):
            return float(found)
        if isinstance(found, Tensor) and found.numel() == 1 and not found.is_meta:
            return float(found)
        return None

    def hides(self, value: Any, factor: float = 1.0) -> bool:
        """Return True if a logit of ``value * factor`` has a weight of 0 beside others."""
        found = self.number(value)
        if found is not None:
            return found <= _HIDES and found * factor <= _HIDES / 16
        # ``torch.finfo(x.dtype).min`` of a dtype that is not known.
        is_min = isinstance(value, Node) and value.target is getattr and value.args[1] == "min"
        return is_min and getattr(value.args[0], "target", None) is torch.finfo

    def is_alone(self, node: Node) -> bool:
        """Return True if one node uses ``node``, once."""
        return len(node.users) == 1


def where(node: Node) -> str:
    """Return file and line of the code that ``node`` comes from, or an empty string."""
    if "where" in node.meta:
        return node.meta["where"]
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    lines = [line for line in trace.splitlines() if line.lstrip().startswith("File ")]
    for line in reversed(lines):
        path, _, rest = line.strip().removeprefix('File "').partition('", line ')
        if "/torch/" not in path:
            return f"{path.rpartition('/')[2]}:{rest.partition(',')[0]}"
    return ""


#: Functions that change their first argument, and methods with their names.
_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in (
        *("iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior"),
        *("ipow", "irshift", "isub", "itruediv", "ixor", "setitem", "delitem"),
    )
)
_IN_PLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _IN_PLACE)
#: Functions that change what later calls compute.
_SWITCHES = frozenset(
    ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode")
    + ("_exit_inference_mode", "manual_seed", "set_default_dtype")
)
#: Packages whose functions say by name, argument or schema that they change something.
_KNOWN = frozenset(
    ("torch", "_operator", "operator", "math", "builtins", "llmos_kernels", "_llmos_kernels")
)


def writes(node: Node) -> bool:
    """Return True if a function or method that ``node`` calls may change a tensor in place."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    ends = name.endswith("_") and not name.endswith("__")
    if node.op == "call_method":
        return ends or name in _IN_PLACE_METHODS
    if node.op != "call_function":
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if ends or target in _IN_PLACE or name in _SWITCHES or "out" in node.kwargs:
        return True
    place = _place_of_inplace(target)
    if place is not None:
        given = node.args[place] if place < len(node.args) else node.kwargs.get("inplace", False)
        if given is not False:
            return True
    origin = getattr(target, "__module__", None) or type(target).__module__
    return str(origin).partition(".")[0] not in _KNOWN


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    """Return where ``function`` takes the argument ``inplace``, if it does."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _module_writes(module: nn.Module) -> bool:
    """Return True if calling ``module`` may change a tensor in place: of others' classes it may."""
    return any(
        getattr(m, "inplace", False) is True
        or str(type(m).__module__).partition(".")[0] not in _KNOWN
        for m in module.modules()
    )
