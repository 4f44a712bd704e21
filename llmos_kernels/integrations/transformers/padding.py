"""Drop-ins that let an encoder of Hugging Face transformers compute the tokens of a batch alone.

A *stack* is the module whose forward calls the layers of an encoder. Where it takes hidden states
and a mask (BERT), it is given the tokens, and a ``Packed`` in place of the mask, which reaches the
attention "llmos" through the layers. Where it looks up the embeddings itself (BART), its layers are
given that. What the stack returns is put back into the batch, with 0 at padding.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.integrations.transformers.attention import (
    are_weights_collected,
    collected_states,
    key_padding_of,
)
from llmos_kernels.nn.packed import Packed
from llmos_kernels.swap.generated_class import GeneratedClass, checkpointed, generate_class

#: The label that losses ignore.
_IGNORED = -100
#: Arguments of a stack with which it takes the padded path, unless they are None or False.
_PADDED_ONLY = ("encoder_hidden_states", "output_attentions", "past_key_values")
#: Arguments of a model that let its loss read all positions.
_READ_ALL = ("start_positions", "end_positions")


class _Current(threading.local):
    """What is true of the call that runs in this thread."""

    #: The batch whose layers run.
    packed: Packed | None = None
    #: Whether something besides attention reads padding: None, or a bool tensor.
    read: Tensor | None = None


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


def _named(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a forward by name."""
    return dict(zip(_parameter_names(cls), args, strict=False)) | kwargs


class PaddingReader(GeneratedClass):
    """A model whose loss may read padded positions: it looks at labels before its stack runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        read = _reads_padding(self.config, _named(self._replaced, args, kwargs))
        with _setting(read=read):
            return self._replaced.forward(self, *args, **kwargs)


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


class PackedStack(GeneratedClass):
    """A stack whose layers compute tokens alone, where nothing reads what padding would give."""

    _reads_first: bool
    _has_states: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _named(self._replaced, args, kwargs)
        packed = _packed(self, given, self._reads_first)
        if packed is None:
            return self._replaced.forward(self, *args, **kwargs)
        if self._has_states:
            states = given.pop("hidden_states")
            given |= {"attention_mask": packed}
            out = self._replaced.forward(self, packed.take(states), **given)
        else:
            with _setting(packed=packed):
                out = self._replaced.forward(self, *args, **kwargs)
        for states in collected_states():
            states[:] = map(packed.padded, states)
        return packed.padded(out)


def _packed(stack: Any, given: dict[str, Any], reads_first: bool) -> Packed | None:
    """Return the pack of a call of ``stack``; None where its padded path has to run."""
    if torch.compiler.is_compiling():
        return None
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor):
        return None
    if any(given.get(name) not in (None, False) for name in _PADDED_ONLY):
        return None
    if are_weights_collected(stack):
        return None
    states = next((given[k] for k in _INPUTS if isinstance(given.get(k), Tensor)), None)
    if states is None:
        return None
    if mask.ndim == 2:
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
        packed = _current.packed
        if packed is not None:
            args = tuple(_given_packed(packed, a) for a in args)
            kwargs = {name: _given_packed(packed, a) for name, a in kwargs.items()}
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._replaced.forward(self, *args, **kwargs)


def _given_packed(packed: Packed, argument: Any) -> Any:
    """Return an argument of a layer for a packed batch: hidden states, a mask, or another."""
    if not isinstance(argument, Tensor):
        return argument
    if argument.ndim == 4 and argument.shape[-1] == packed.length:
        return packed
    return packed.take(argument) if packed.is_padded(argument) else argument


@functools.cache
def padding_reader(replaced: Any) -> type:
    """Return the drop-in subclass of ``replaced``, a model."""
    return generate_class(PaddingReader, replaced, (padding_reader, (replaced,)), same_name=True)


@functools.cache
def packed_stack(replaced: Any, reads_first: bool) -> type:
    """Return the drop-in subclass of ``replaced``, a stack.

    Args:
        replaced: the class of the stack.
        reads_first: whether a head reads position 0 of what it returns, whatever that is.
    """
    names = _parameter_names(replaced)
    made_by = packed_stack, (replaced, reads_first)
    members = {"_reads_first": reads_first, "_has_states": names[0] == "hidden_states"}
    return generate_class(PackedStack, replaced, made_by, same_name=True, **members)


def reading_first(cls: Any) -> type:
    """Return the drop-in of a stack that knows of a head that reads position 0; others as given."""
    return packed_stack(cls._replaced, True) if issubclass(cls, PackedStack) else cls


@functools.cache
def packed_layer(replaced: Any) -> type:
    """Return the drop-in subclass of ``replaced``, a layer."""
    made_by = packed_layer, (replaced,)
    return checkpointed(generate_class(PackedLayer, replaced, made_by, same_name=True))


def why_no_stack(stack: nn.Module) -> str:
    """Return why a module cannot be a stack, or an empty string."""
    names = _parameter_names(type(stack))
    if "attention_mask" not in names or names[0] not in _INPUTS:
        return f"{type(stack).__name__} takes neither hidden states nor tokens, with a mask"
    return ""
