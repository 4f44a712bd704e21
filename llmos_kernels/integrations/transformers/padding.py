"""Drop-ins that let an encoder of Hugging Face transformers compute the tokens of a batch alone.

A *stack* is the module whose forward calls the layers of an encoder. Where it takes hidden states
and a mask (BERT), it is given the tokens, and a ``Packed`` in place of the mask, which reaches the
attention "llmos" through the layers. Where it looks up the embeddings itself (BART), its layers are
given that. What the stack returns is put back into the batch, with 0 at padding. Where the model
around a stack has embeddings that take positions, they are looked up for tokens alone.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmos_kernels.integrations.transformers.attention import (
    NAME,
    are_weights_collected,
    collected_states,
    key_padding_of,
)
from llmos_kernels.nn.packed import Packed
from llmos_kernels.swap.generated_class import (
    GeneratedClass,
    checkpointed,
    class_of,
    generate_class,
    named_as_before,
    recipe,
)

#: The label that losses ignore.
_IGNORED = -100
#: Arguments of a stack with which it takes the padded path, unless they are None or False.
_PADDED_ONLY = ("encoder_hidden_states", "output_attentions", "past_key_values")
#: Arguments of a model that let its loss read all positions.
_READ_ALL = ("start_positions", "end_positions")


class _Current(threading.local):
    """What is true of the call that runs in this thread."""

    #: Whether something besides attention reads padding: None, or a bool tensor.
    read: Tensor | None = None
    #: The batch that a model has packed for its stack; None where there is no model around the
    #: stack, False where that has its reasons not to.
    batch: Packed | bool | None = None
    #: The batch whose layers run.
    of_layers: Packed | None = None


_current = _Current()


@contextlib.contextmanager
def _setting(**values: Any) -> Iterator[None]:
    before = {name: getattr(_current, name) for name in values}
    for name, value in values.items():
        setattr(_current, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(_current, name, value)


@functools.cache
def _parameter_names(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def named(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a forward by name."""
    return dict(zip(_parameter_names(cls), args, strict=False)) | kwargs


class PaddingReader(GeneratedClass):
    """A model whose loss may read padded positions: it looks at labels before its stack runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        read = _reads_padding(self.config, named(type(self), args, kwargs))
        with _setting(read=read):
            return super().forward(*args, **kwargs)


def _reads_padding(config: Any, given: dict[str, Any]) -> Tensor | None:
    """Return whether the loss of a model reads padding, as ``_Current.read``."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or config.is_encoder_decoder:
        return None
    if any(given.get(name) is not None for name in _READ_ALL):
        return mask.new_ones((), dtype=torch.bool)
    labels = given.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != mask.shape:
        return None
    return ((labels != _IGNORED) & (mask == 0)).any()


class PackedModel(GeneratedClass):
    """A model that packs a batch before its embeddings are looked up, those of padding never."""

    _reads_first: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        given = named(type(self), args, kwargs)
        with _setting(batch=_packed(self, given, self._reads_first) or False):
            return super().forward(*args, **kwargs)


class PackedEmbeddings(GeneratedClass):
    """The embeddings of a ``PackedModel``: 0 at padding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        packed = _current.batch
        given = named(type(self), args, kwargs)
        name = "input_ids" if given.get("input_ids") is not None else "inputs_embeds"
        inputs: Any = given.get(name)
        if not isinstance(packed, Packed) or packed.is_whole or not packed.is_padded(inputs):
            return super().forward(*args, **kwargs)
        if given.get("position_ids") is None:
            given["position_ids"] = _position_ids(self, name, inputs)
        given[name] = packed.take(inputs)
        for name in ("position_ids", "token_type_ids"):
            if isinstance(given.get(name), Tensor):
                given[name] = packed.take(given[name].broadcast_to(inputs.shape[:2]))
        return packed.put(super().forward(**given))


def _position_ids(embeddings: Any, name: str, inputs: Tensor) -> Tensor:
    """Return the positions that embeddings of transformers look up for their inputs.

    ``name`` is that of the argument: "input_ids" or "inputs_embeds".
    """
    create = getattr(embeddings, f"create_position_ids_from_{name}", None)
    if create is not None:
        return create(inputs, embeddings.padding_idx)
    return embeddings.position_ids[:, : inputs.shape[1]]


class PackedStack(GeneratedClass):
    """A stack whose layers compute tokens alone, where nothing reads what padding would give."""

    _reads_first: bool
    _has_states: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        given = named(type(self), args, kwargs)
        packed = _current.batch
        if packed is None:
            packed = _packed(self, given, self._reads_first)
        if not isinstance(packed, Packed) or packed.is_whole:
            return super().forward(*args, **kwargs)
        if self._has_states:
            states = given.pop("hidden_states")
            if not packed.is_padded(states):
                return super().forward(*args, **kwargs)
            given |= {"attention_mask": packed}
            out = super().forward(packed.take(states), **given)
        else:
            with _setting(of_layers=packed):
                out = super().forward(*args, **kwargs)
        for states in collected_states():
            states[:] = map(packed.padded, states)
        return packed.padded(out)


def _packed(module: Any, given: dict[str, Any], reads_first: bool) -> Packed | None:
    """Return the pack of a call of a model or a stack; None where its padded path has to run."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor):
        return None
    if any(given.get(name) not in (None, False) for name in _PADDED_ONLY):
        return None
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", NAME) != NAME:
        return None  # Another was chosen since.
    if getattr(config, "output_attentions", False) or are_weights_collected(module):
        return None
    states = next((given[k] for k in _INPUTS if isinstance(given.get(k), Tensor)), None)
    if states is None:
        return None
    if mask.ndim == 2:
        if mask.device.type == "cpu" and mask.all():
            return None  # The quickest way to see it.
        is_token = mask.bool()
    else:
        attn_mask, padding = key_padding_of(mask, states.shape[0])
        if attn_mask is not None or padding is None:
            return None
        is_token = ~padding
    if states.shape[:2] != is_token.shape:
        return None
    unless = [] if _current.read is None else [_current.read]
    if reads_first:
        unless.append(~is_token[:, 0].all())
    return Packed.of(is_token, unless)


#: Arguments of a stack that begin with [batch, length].
_INPUTS = ("hidden_states", "inputs_embeds", "input_ids")


class PackedLayer(GeneratedClass):
    """A layer of a stack that looks up its embeddings itself: it takes the tokens of its input."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Before the forward, which a checkpoint runs again, when no call of the stack runs.
        packed = None if torch.compiler.is_compiling() else _current.of_layers
        if packed is not None:
            args = tuple(_given_packed(packed, a) for a in args)
            kwargs = {name: _given_packed(packed, a) for name, a in kwargs.items()}
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def _given_packed(packed: Packed, argument: Any) -> Any:
    """Return an argument of a layer for a packed batch: hidden states, a mask, or another."""
    if not isinstance(argument, Tensor):
        return argument
    if argument.ndim == 4 and argument.shape[-1] == packed.length:
        return packed
    return packed.take(argument) if packed.is_padded(argument) else argument


def padding_reader(replaced: Any) -> type:
    """Return the drop-in subclass of ``replaced``, a model with a loss."""
    return _generated(PaddingReader, recipe(replaced))


def packed_model(replaced: Any, reads_first: bool) -> type:
    """Return the drop-in subclass of ``replaced``, a model around a stack.

    Args:
        replaced: its class.
        reads_first: whether a head reads position 0 of what it returns, whatever that is.
    """
    return _generated(PackedModel, recipe(replaced), reads_first)


def packed_embeddings(replaced: Any) -> type:
    """Return the drop-in subclass of ``replaced``, the embeddings of a model."""
    return _generated(PackedEmbeddings, recipe(replaced))


def packed_stack(replaced: Any, reads_first: bool) -> type:
    """Return the drop-in subclass of ``replaced``, a stack.

    Args:
        replaced: the class of the stack.
        reads_first: as for ``packed_model``.
    """
    return _generated(PackedStack, recipe(replaced), reads_first)


def packed_layer(replaced: Any) -> type:
    """Return the drop-in subclass of ``replaced``, a layer."""
    return _generated(PackedLayer, recipe(replaced))


def reading_first(cls: Any) -> type:
    """Return the drop-in that knows of a head that reads position 0; others as given."""
    _, (base, made_by, *_) = cls._made_by
    return _generated(base, made_by, True) if base in (PackedModel, PackedStack) else cls


@functools.cache
def _generated(base: Any, made_by: Any, reads_first: bool = False) -> Any:
    replaced: Any = class_of(made_by)
    members: Any = {"_reads_first": reads_first}
    if base is PackedStack:
        members["_has_states"] = _parameter_names(replaced)[0] == "hidden_states"
    made = generate_class(base, replaced, (_generated, (base, made_by, reads_first)), **members)
    return checkpointed(named_as_before(made)) if base is PackedLayer else named_as_before(made)


def why_no_stack(cls: Any) -> str:
    """Return why a module of a class cannot be a stack, or an empty string."""
    names = _parameter_names(cls)
    if "attention_mask" not in names or names[0] not in _INPUTS:
        return f"{cls.__name__} takes neither hidden states nor tokens, with a mask"
    return ""


def are_packable(embeddings: Any) -> bool:
    """Return whether a module looks up embeddings of given positions, and says which by itself."""
    cls: Any = type(embeddings)
    names = _parameter_names(cls)
    known = hasattr(embeddings, "create_position_ids_from_input_ids")
    known = known or isinstance(getattr(embeddings, "position_ids", None), Tensor)
    return known and {"input_ids", "position_ids"} <= {*names}
