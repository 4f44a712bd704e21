"""The operations that patterns know, whichever way a graph calls them.

``x.softmax(-1)``, ``torch.softmax(x, -1)``, ``F.softmax(x, dim=-1)`` and a call of ``nn.Softmax``
are all the operation "softmax" with the arguments ``input`` and ``dim``.
"""

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

import llmos_kernels.nn as fused

#: The operations by the names of their arguments, with the functions and methods that compute them.
_FORMS: tuple[tuple[str, str, tuple[Callable, ...], tuple[str, ...]], ...] = (
    ("matmul", "input other", (torch.matmul, torch.bmm, operator.matmul), ("matmul", "bmm")),
    ("baddbmm", "input batch1 batch2 beta alpha", (torch.baddbmm,), ("baddbmm",)),
    ("softmax", "input dim dtype", (torch.softmax,), ("softmax",)),
    ("softmax", "input dim _stacklevel dtype", (F.softmax,), ()),
    ("dropout", "input p training inplace", (F.dropout, torch.dropout), ()),
    ("add", "input other alpha", (operator.add, operator.iadd, torch.add), ("add", "add_")),
    ("sub", "input other alpha", (operator.sub, operator.isub, torch.sub), ("sub", "sub_")),
    ("mul", "input other", (operator.mul, operator.imul, torch.mul), ("mul", "mul_")),
    (
        "div",
        "input other rounding_mode",
        (operator.truediv, operator.itruediv, torch.div, torch.true_divide),
        ("div", "div_", "true_divide"),
    ),
    ("pow", "input exponent", (operator.pow, torch.pow), ("pow",)),
    ("square", "input", (torch.square,), ("square",)),
    ("sqrt", "input", (torch.sqrt,), ("sqrt",)),
    ("rsqrt", "input", (torch.rsqrt,), ("rsqrt",)),
    ("reciprocal", "input", (torch.reciprocal,), ("reciprocal",)),
    ("mean", "input dim keepdim dtype", (torch.mean,), ("mean",)),
    ("var", "input dim unbiased keepdim correction", (torch.var,), ("var",)),
    ("masked_fill", "input mask value", (torch.masked_fill,), ("masked_fill", "masked_fill_")),
    ("where", "condition input other", (torch.where,), ()),
    ("where", "input condition other", (), ("where",)),
    ("linear", "input weight bias", (F.linear,), ()),
    ("layer_norm", "input normalized_shape weight bias eps", (F.layer_norm,), ()),
    ("rms_norm", "input normalized_shape weight eps", (F.rms_norm, torch.rms_norm), ()),
    ("activation", "input inplace", (F.relu, F.silu), ()),
    ("activation", "input approximate", (F.gelu,), ()),
    ("activation", "input", (torch.relu, torch.relu_), ("relu", "relu_")),
    ("cast", "input dtype", (), ("to", "type", "float", "half", "bfloat16", "type_as")),
    ("transpose", "input dim0 dim1", (torch.transpose,), ("transpose", "swapaxes")),
    ("logical_not", "input", (operator.invert, torch.logical_not), ("logical_not",)),
    ("eq", "input other", (operator.eq, torch.eq), ("eq",)),
    ("expand_as", "input other", (), ("expand_as",)),
    ("repeat_interleave", "input repeats dim", (torch.repeat_interleave,), ("repeat_interleave",)),
    ("unsqueeze", "input dim", (torch.unsqueeze,), ("unsqueeze",)),
    ("detach", "input", (torch.detach,), ("detach",)),
    ("maximum", "input dim keepdim", (torch.amax, torch.max), ("amax", "max")),
    ("getitem", "input index", (operator.getitem,), ()),
    (
        "sdpa",
        "query key value attn_mask dropout_p is_causal scale enable_gqa",
        (F.scaled_dot_product_attention,),
        (),
    ),
)
_OF_FUNCTION = {f: (kind, names.split()) for kind, names, fs, _ in _FORMS for f in fs}
_OF_METHOD = {m: (kind, names.split()) for kind, names, _, ms in _FORMS for m in ms}
_OF_METHOD |= {
    f"__{m}__": (kind, names.split()) for kind, names, _, ms in _FORMS for m in ms if m[-1] != "_"
}
_ACTIVATIONS: Mapping[Any, str] = MappingProxyType(
    {F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.silu: "silu"}
    | {"relu": "relu", "relu_": "relu"}
)
#: Those that take sizes, each as an argument of its own or all as one.
_SIZED: Mapping[Any, str] = MappingProxyType(
    {"view": "view", "reshape": "view", torch.reshape: "view", "expand": "expand"}
)
_CASTS = MappingProxyType(
    {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
)
#: The modules that patterns know, with the operation they compute.
_MODULES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((nn.Linear, fused.Linear), "linear"),
    ((nn.LayerNorm, fused.LayerNorm), "layer_norm"),
    ((nn.Dropout,), "dropout"),
)


class ModuleRef(NamedTuple):
    """A module of the root module, by its dotted name: at run time the module itself."""

    target: str


class Op(NamedTuple):
    """An operation of a graph.

    Args:
        kind: its name here.
        args: its arguments, by the names in ``_FORMS``. A module's are its ``input`` and the
            ``ModuleRef`` under "module".
        node: the node that computes it.
    """

    kind: str
    args: Mapping[str, Any]
    node: Node

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or ``default`` where the call does not give it."""
        return self.args.get(name, default)


def rank_of(node: Any) -> int | None:
    """Return the number of dimensions of what ``node`` computes, or None."""
    return getattr(getattr(node, "meta", {}).get("example_value"), "ndim", None)


def operation(node: Any, module: nn.Module | None, activation: str | None) -> Op | None:
    """Return the operation that ``node`` computes, or None.

    Args:
        node: a node.
        module: the module that a "call_module" node calls.
        activation: the activation that this module computes, if any.
    """
    if not isinstance(node, Node):
        return None
    if node.op == "call_module":
        return _of_module(node, module, activation)
    if node.op == "call_function" and node.target is torch.einsum:
        return _einsum(node)
    if node.target is getattr and node.args[1] == "mT":
        return Op("transpose", {"input": node.args[0], "dim0": -2, "dim1": -1}, node)
    if node.target is getattr and node.args[1] == "values":  # Of ``max`` and the like.
        return Op("getitem", {"input": node.args[0], "index": 0}, node)
    if node.target in _SIZED and not node.kwargs:
        first, *rest = node.args
        sizes: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        return Op(_SIZED[node.target], {"input": first, "sizes": tuple(sizes)}, node)
    table: Any = {"call_function": _OF_FUNCTION, "call_method": _OF_METHOD}.get(node.op, {})
    target: Any = node.target
    if target not in table:
        return None
    kind, names = table[target]
    if len(node.args) > len(names):
        return None
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if not given.keys() <= {*names}:
        return None
    if kind == "activation":
        return _of_activation(node, target, given)
    if kind == "cast":
        return _of_cast(node, target, given)
    return Op(kind, given, node)


def _of_module(node: Node, module: nn.Module | None, activation: str | None) -> Op | None:
    given = [*node.args, *node.kwargs.values()]
    if len(given) != 1 or module is None:
        return None
    args = {"input": given[0], "module": ModuleRef(str(node.target))}
    kind = next((kind for classes, kind in _MODULES if type(module) in classes), None)
    if kind is not None:
        return Op(kind, args, node)
    if type(module) is nn.Softmax:
        return Op("softmax", args | {"dim": module.dim}, node)
    return None if activation is None else Op("activation", args | {"name": activation}, node)


def _einsum(node: Node) -> Op | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = [*operands[0]]
    if not isinstance(equation, str) or len(operands) != 2 or node.kwargs:
        return None
    names = {"equation": equation, "input": operands[0], "other": operands[1]}
    return Op("einsum", names, node)


def _of_activation(node: Node, target: Any, given: dict[str, Any]) -> Op | None:
    name = _ACTIVATIONS.get(target)
    if target is F.gelu:
        approximate = given.get("approximate", "none")
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return None if name is None else Op("activation", {"input": given["input"], "name": name}, node)


def _of_cast(node: Node, target: str, given: dict[str, Any]) -> Op | None:
    dtype = given.get("dtype")
    if target in _CASTS and dtype is None:
        dtype = _CASTS[target]
    if target == "type_as":  # Its argument is a tensor, of whose dtype the result is.
        return Op("cast", {"input": given["input"], "like": dtype}, node)
    if not isinstance(dtype, torch.dtype):
        return None
    return Op("cast", {"input": given["input"], "dtype": dtype}, node)
