"""The encoder layers of BERT and its relatives in Hugging Face transformers.

    x = LayerNorm(input + dense(attention(input))),   output = LayerNorm(x + feed_forward(x))

They are known by their parts, not by name: BERT, RoBERTa, ELECTRA, CamemBERT and others share them.
"""

import functools
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import llmos_kernels.nn as fused
from llmos_kernels.nn.encoder_layer import LayerParts, whole_layer
from llmos_kernels.nn.frozen import Freezable, panels_of
from llmos_kernels.nn.fusible import is_fusible
from llmos_kernels.nn.linear import linear_parameters
from llmos_kernels.nn.packed import Packed
from llmos_kernels.ops._encoder_layer import LayerMasks, may_fuse
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.generated_class import GeneratedClass, checkpointed, generate_class
from llmos_kernels.swap.proof import judge
from llmos_kernels.swap.rules._kinks import largest_error_without_kinks
from llmos_kernels.swap.rules.rule import Candidate, Match, Rule, example_batch, tensor_options
from llmos_kernels.swap.rules.sequential import activation_of

_RESIDUAL = MappingProxyType({"dense": nn.Linear, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout})
#: The children of the modules in a layer, by the names of these modules, with their classes. None
#: is another module of transformers, "activation" one that computes an activation.
_CHILDREN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "": {"attention": None, "intermediate": None, "output": None},
        "attention": {"self": None, "output": None},
        "attention.self": {
            **dict.fromkeys(("query", "key", "value"), nn.Linear),
            "dropout": nn.Dropout,
        },
        "attention.output": _RESIDUAL,
        "intermediate": {"dense": nn.Linear, "intermediate_act_fn": "activation"},
        "output": _RESIDUAL,
    }
)
#: The linear layers, in the order of the op.
_LINEAR_LAYERS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_MODELS = "transformers.models."
#: The module of transformers whose hooks record hidden states and attention weights.
_CAPTURING = "transformers.utils.output_capturing"
#: Attributes of the attention. Without ``is_causal`` its attention function decides what it is.
_ATTRIBUTES = ("config", "is_causal", "num_attention_heads", "scaling")
#: Attention functions that compute plain attention with the mask that they are given.
_ATTENTION = ("eager", "sdpa", "llmos")
#: Arguments of a layer that do not change its result, whatever their value.
_HARMLESS = frozenset(("output_hidden_states", "return_dict", "use_cache"))


class Layout(NamedTuple):
    """What a drop-in was made for, and compares at each call."""

    classes: tuple[type, ...]  # Of the modules of ``_CHILDREN``, in order.
    activation: str
    activation_class: type


class FusedBertLayer(Freezable, GeneratedClass):
    """A BERT layer that at inference is one op; where that is not possible its own forward runs."""

    _layout: Layout

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(hidden_states, Tensor):
            out = _whole(self, self._layout, hidden_states, *args, **kwargs)
            if out is not None:
                return out
        return self._replaced.forward(self, hidden_states, *args, **kwargs)

    def weights_to_freeze(self) -> list[Tensor]:
        layers = [linear_parameters(self.get_submodule(name)) for name in _LINEAR_LAYERS]
        weights = [parameters[0] for parameters in layers if parameters is not None]
        return weights if len(weights) == len(layers) else []

    def is_one_op(self, src: Tensor) -> bool:
        return _whole(self, self._layout, src) is not None


def _whole(
    layer: Any,
    layout: Layout,
    hidden_states: Tensor,
    attention_mask: Tensor | Packed | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor | None:
    """Return the output of ``layer`` by one op, or None where its own forward has to run."""
    masks = _masks(attention_mask)
    children = layer._modules
    intermediate, output = children.get("intermediate"), children.get("output")
    if masks is None or intermediate is None or output is None:
        return None
    first = intermediate._modules.get("dense")
    weight = None if first is None else first._parameters.get("weight")
    if weight is None or not may_fuse(hidden_states, masks, weight):
        return None
    if any(a is not None for a in args) or not all(map(_is_harmless, kwargs.items())):
        return None
    attention = children["attention"]
    attend, attended = (attention._modules.get(name) for name in ("self", "output"))
    inner: list[Any] = [attention, attend, attended, intermediate, output]
    if tuple(map(_class_of, (layer, *inner))) != layout.classes or not all(map(_is_fusible, inner)):
        return None
    if not _is_plain_attention(attend, attention_mask) or layer.chunk_size_feed_forward:
        return None
    activation: Any = intermediate._modules["intermediate_act_fn"]
    if not is_fusible(activation) or type(activation) is not layout.activation_class:
        return None
    residual = attended._modules
    parts = LayerParts(
        [linear_parameters(attend._modules[name]) for name in ("query", "key", "value")],
        linear_parameters(residual["dense"]),
        first,
        output._modules["dense"],
        residual["LayerNorm"],
        output._modules["LayerNorm"],
        (attend._modules["dropout"], residual["dropout"], output._modules["dropout"]),
        layout.activation,
        attend.num_attention_heads,
        attend.scaling,
        False,
    )
    return whole_layer(hidden_states, masks, parts, panels_of(layer))


def _masks(mask: Any) -> LayerMasks | None:
    """Return the masks of transformers' ``attention_mask``; None if it is no tensor."""
    if mask is None:
        return LayerMasks()
    if isinstance(mask, Packed):
        return LayerMasks(cu_seqlens=mask.cu_seqlens)
    if not isinstance(mask, Tensor):
        return None
    alike = mask.dim() == 4 and mask.shape[1] == 1 and (mask.shape[2] == 1 or not mask.stride(2))
    if alike and mask.dtype == torch.bool:
        return LayerMasks(None, ~mask[:, 0, 0])
    return LayerMasks(mask)


def _is_fusible(module: nn.Module) -> bool:
    """Return ``is_fusible``, also where transformers has left hooks that record nothing now.

    A model that was once asked for its hidden states or attention weights keeps such hooks.
    """
    hooks = module._forward_hooks.values()
    if not hooks or any(getattr(h, "__module__", None) != _CAPTURING for h in hooks):
        return is_fusible(module)
    collector = getattr(sys.modules[_CAPTURING], "_active_collector", None)
    return is_fusible(module, collector is not None and not collector.get())


def _is_harmless(argument: tuple[str, Any]) -> bool:
    name, value = argument
    return value is None or value is False or name in _HARMLESS


def _class_of(module: Any) -> type:
    """Return the class of ``module``, that of before for one that was swapped."""
    return vars(type(module)).get("_replaced", type(module))


def _is_plain_attention(attend: Any, mask: Tensor | Packed | None) -> bool:
    """Return whether the attention is bidirectional, by a function that ``_ATTENTION`` lists."""
    name = attend.config._attn_implementation
    if attend.is_causal is not False or name not in _ATTENTION or attend.config.output_attentions:
        return False
    # transformers' eager attention adds whatever mask it gets.
    if isinstance(mask, Packed):
        return name == "llmos"
    return name != "eager" or mask is None or mask.is_floating_point()


@functools.cache
def fused_bert_layer(replaced: Any, layout: Layout) -> type:
    """Return the drop-in subclass of ``replaced`` for layers of that ``layout``."""
    made_by = (fused_bert_layer, (replaced, layout))
    return checkpointed(generate_class(FusedBertLayer, replaced, made_by, _layout=layout))


class BertLayerRule(Rule):
    """Swaps layers whose modules are transformers' own and have BERT's names and classes."""

    def match(self, module: nn.Module) -> Match | None:
        cls: Any = type(module)
        if not (cls.__module__.startswith(_MODELS) and _has_parts(module) and _returns_tensor(cls)):
            return None
        activation: Any = module.get_submodule("intermediate.intermediate_act_fn")
        name = activation_of(activation)
        if name is None:
            return None
        parts = (module.get_submodule(name) if name else module for name in _CHILDREN)
        classes: Any = tuple(map(_class_of, parts))
        return Match(fused_bert_layer(cls, Layout(classes, name, type(activation))))

    def why_not(self, module: Any) -> str:
        attend = module.attention.self
        if attend.is_causal is not False:
            return "it is a layer of a decoder"
        name = attend.config._attn_implementation
        return "" if name in _ATTENTION else f"its attention is {name!r}, chosen by name"

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return a call with key padding, and one without masks."""
        attend: Any = candidate.module.get_submodule("attention.self")
        options = tensor_options(candidate.module)
        batch, length = example_batch(size)
        device = options["device"]
        x = torch.randn(batch, length, attend.query.in_features, **options)
        lengths = torch.randint(1, length + 1, (batch, 1, 1, 1), device=device)
        mask = (torch.arange(length, device=device) < lengths).expand(-1, -1, length, -1)
        if attend.config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(
                ~mask, torch.finfo(x.dtype).min
            )
        return [ModuleCall((x, mask)), ModuleCall((x,))]

    def largest_error(self, candidate: Candidate, call: ModuleCall) -> float:
        """Return the largest error, also at inference, where the drop-in is one op."""
        inference = judge(self.replicas(candidate), call, extent="inference")
        return max(inference, largest_error_without_kinks(candidate, call))


def _has_parts(layer: nn.Module) -> bool:
    """Return whether the modules in ``layer`` are those of ``_CHILDREN``, with no other state."""
    for name, expected in _CHILDREN.items():
        module = layer.get_submodule(name) if name else layer
        if module._modules.keys() != expected.keys() or module._parameters or module._buffers:
            return False
        for child, cls in expected.items():
            found = _class_of(module._modules[child])
            if cls is None and not found.__module__.startswith(_MODELS):
                return False
            if isinstance(cls, type) and not _is_exactly(found, cls):
                return False
    attend = layer.get_submodule("attention.self")
    return all(map(vars(attend).__contains__, _ATTRIBUTES)) and "chunk_size_feed_forward" in vars(
        layer
    )


def _is_exactly(found: type, cls: type) -> bool:
    """Return whether ``found`` is ``cls``, or our drop-in of it."""
    return found in (cls, getattr(fused, cls.__name__, cls))


def _returns_tensor(cls: Any) -> bool:
    """Return whether the forward of ``cls`` says that it returns a tensor, and no tuple."""
    returned = getattr(cls.forward, "__annotations__", {}).get("return")
    return returned is Tensor or returned in ("Tensor", "torch.Tensor")
