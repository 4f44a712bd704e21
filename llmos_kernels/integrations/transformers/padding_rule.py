"""The rule of ``optimize(skip_padding=True)`` for Hugging Face models.

It finds the stacks of encoders by running the model, and proves on the whole model that what it
returns at tokens, and the gradients of all parameters, stay the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmos_kernels.integrations.transformers.attention_rule import (
    TransformersAttentionRule,
    attending,
    chosen,
    example_calls,
    why_no_attention,
)
from llmos_kernels.integrations.transformers.padding import (
    are_packable,
    named,
    packed_embeddings,
    packed_layer,
    packed_model,
    packed_stack,
    padding_reader,
    reading_first,
    why_no_stack,
)
from llmos_kernels.swap.calls import ModuleCall, set_training
from llmos_kernels.swap.padding import (
    CannotSkipError,
    Change,
    PaddingCandidate,
    PaddingRule,
    skips_padding,
)
from llmos_kernels.swap.padding_proof import largest_error, run
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.rules.rule import ancestors

#: The largest batch and length of a proof.
_BATCH, _LENGTH = 4, 64


class TransformersPaddingRule(PaddingRule):
    """Lets the encoders of Hugging Face models compute the tokens of padded batches alone."""

    def candidates(self, model: nn.Module) -> Iterator[PaddingCandidate]:
        """Yield the outermost Hugging Face models in ``model`` that compute padding."""
        inside: set[nn.Module] = set()
        for name, module in model.named_modules():
            if not isinstance(module, PreTrainedModel) or module in inside:
                continue
            inside.update(module.modules())
            if skips_padding(module):
                continue
            why = why_no_attention(module, ancestors(model, name)) or _why_not(module)
            yield PaddingCandidate(name, module, self, why)

    def change(
        self, model: Any, captured: list[ModuleCall], verify: bool, is_whole: bool
    ) -> tuple[float | None, Change]:
        right, left = _calls(model, captured)
        change = _classes(model, right)
        # A pooler or a head, or what is around the model, may read position 0, which is padding to
        # the left.
        careful = {m: reading_first(cls) for m, cls in change.items()}
        if not verify:
            run(model, careful, right)
            return None, careful
        error = _largest_error(model, change, right)
        if not is_whole or (error <= 1 and not _largest_error(model, change, left) <= 1):
            return max(error, _largest_error(model, careful, left)), careful
        return error, change

    def switch(self, model: Any) -> tuple[Callable[[], None], Callable[[], None]]:
        return TransformersAttentionRule().switch(model)

    def is_token(self, model: Any, call: ModuleCall) -> Tensor | None:
        mask = _mask_of(_by_name(model, call))
        return None if mask is None else mask != 0


def _why_not(model: Any) -> str:
    """Return why a model cannot leave out its padding, or an empty string."""
    if getattr(model.config, "chunk_size_feed_forward", 0):
        return "its config has chunk_size_feed_forward, which splits the length"
    if any("relative_attention_bias" in m._modules for m in model.modules()):
        return "its attention has relative positions"
    return ""


def _calls(model: Any, captured: list[ModuleCall]) -> list[ModuleCall]:
    """Return a call whose padding is to the right, with holes, and one with it to the left.

    Raises:
        CannotSkipError: the captured calls have no mask.
    """
    calls = [_by_name(model, c) for c in captured]
    call = next((c for c in calls if _mask_of(c) is not None), None)
    if call is None:
        if captured:
            raise CannotSkipError("inputs have no attention_mask [batch, length]")
        call = example_calls(model, _BATCH, _LENGTH // 4)[1]
    mask: Any = _mask_of(call)
    if ((mask != 0) & (mask != 1)).any():
        raise CannotSkipError("attention_mask has other values than 0 and 1")
    shape, part = mask.shape, (slice(_BATCH), slice(_LENGTH))

    def cut(t: Tensor) -> Tensor:
        return t[part] if t.shape[:2] == shape else t[:_BATCH] if t.shape[:1] == shape[:1] else t

    call = call.map(cut)
    batch, length = mask[part].shape
    columns = torch.arange(length, device=mask.device)
    lengths = (length - columns[:batch] * length // (batch + 1))[:, None]  # The first is full.
    right = (columns < lengths) & ((columns % 5 != 3) | (lengths < length))
    if batch == 1:
        right = columns[None] < max(1, length - 1)
    return [_masked(call, is_token.to(mask.dtype)) for is_token in (right, right.flip(1))]


def _by_name(model: Any, call: ModuleCall) -> ModuleCall:
    """Return the call with all arguments by name."""
    return ModuleCall(kwargs=named(type(model), call.args, call.kwargs))


def _mask_of(call: ModuleCall) -> Tensor | None:
    mask = call.kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _masked(call: ModuleCall, mask: Tensor) -> ModuleCall:
    """Return the call with another mask, and labels that are ignored at padding."""
    labels = call.kwargs.get("labels")
    given = {**call.kwargs, "attention_mask": mask}
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        given["labels"] = labels.masked_fill(mask == 0, -100)
    return ModuleCall(call.args, given)


def _classes(model: Any, call: ModuleCall) -> Change:
    """Return the new class of each module that changes.

    Raises:
        CannotSkipError: the model has no encoder, or one whose layers are not found.
    """
    copied = replica(model)
    set_training(copied, False)
    names_of = {m: name for name, m in copied.named_modules()}
    with chosen(copied), torch.enable_grad():  # With gradients no layer is one op.
        called = attending(partial(call.on, copied))
    names = [names_of[m] for m in called if m in names_of]  # Others are copies of a tracer.
    found: Change = {}
    for name in names:
        attention = model.get_submodule(name)
        if getattr(attention, "is_causal", True):
            continue
        base, stack, layers = _stack_of(model, name)
        if stack in found or _has_decoder(stack, model, names):
            continue
        cls: Any = type(stack)
        if why := why_no_stack(cls):
            raise CannotSkipError(why)
        packed: Any = packed_stack(cls, False)
        found[stack] = packed
        if not packed._has_states:
            found |= {layer: packed_layer(_class(layer)) for layer in layers}
        embeddings = [m for m in base.children() if are_packable(m)]
        if len(embeddings) == 1 and base is not stack:
            found[base] = packed_model(_class(base), False)
            found[embeddings[0]] = packed_embeddings(_class(embeddings[0]))
    if not found:
        raise CannotSkipError("no encoder in it takes its attention from AttentionInterface")
    if model not in found:
        found[model] = padding_reader(_class(model))
    return found


def _class(module: nn.Module) -> Any:
    return type(module)


def _stack_of(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module, nn.ModuleList]:
    """Return the innermost model of transformers around the module ``name``, and its stack.

    That is the module whose layers contain ``name``; the third result is the list of these.
    """
    around = [*ancestors(model, name)]
    first = max(i for i, m in enumerate(around) if isinstance(m, PreTrainedModel))
    for outer, inner in zip(around[first:], around[first + 1 :], strict=False):
        if isinstance(inner, nn.ModuleList):
            return around[first], outer, inner
    raise CannotSkipError(f"{name} is in no list of layers")


def _has_decoder(stack: nn.Module, model: nn.Module, names: list[str]) -> bool:
    """Return whether attention inside of ``stack`` is causal: others there attend to memory."""
    inside = set(stack.modules())
    modules = [model.get_submodule(name) for name in names]
    return any(m in inside and getattr(m, "is_causal", True) for m in modules)


def _largest_error(model: Any, change: Change, call: ModuleCall) -> float:
    with chosen(model):  # All copies share the config.
        return largest_error(model, change, call, _at_tokens)


def _at_tokens(call: ModuleCall, results: list[Tensor]) -> list[Tensor]:
    """Return those of the results that have a place for each position at tokens alone."""
    mask: Any = _mask_of(call)
    return [t[mask != 0] if t.shape[:2] == mask.shape else t for t in results]
