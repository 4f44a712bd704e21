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

from llmos_kernels._core.numerics import Compared, exactly, make_gradients, with_scale
from llmos_kernels.integrations.transformers.attention_rule import (
    TransformersAttentionRule,
    attending,
    chosen,
    example_calls,
    why_no_attention,
)
from llmos_kernels.integrations.transformers.padding import (
    packed_layer,
    packed_stack,
    padding_reader,
    reading_first,
    why_no_stack,
)
from llmos_kernels.swap.calls import ModuleCall, set_training, tensors_in
from llmos_kernels.swap.padding import Change, PaddingRule, skips_padding
from llmos_kernels.swap.proof import DRAWS, largest_of
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.rules.rule import ModelCandidate, ancestors

#: The largest batch and length of a proof.
_BATCH, _LENGTH = 4, 64


class TransformersPaddingRule(PaddingRule):
    """Lets the encoders of Hugging Face models compute the tokens of padded batches alone."""

    def candidates(self, model: nn.Module) -> Iterator[ModelCandidate]:
        """Yield the outermost Hugging Face models in ``model`` that compute padding."""
        inside: set[nn.Module] = set()
        for name, module in model.named_modules():
            if not isinstance(module, PreTrainedModel) or module in inside:
                continue
            inside.update(module.modules())
            if skips_padding(module):
                continue
            shown = f"padding of {type(module).__name__}"
            why = why_no_attention(module, ancestors(model, name)) or _why_not(module)
            yield ModelCandidate(name, module, self, shown, why)

    def change(
        self, model: Any, captured: list[ModuleCall], verify: bool
    ) -> tuple[float | None, Change]:
        right, left = _calls(model, captured)
        change = _classes(model, right)
        if not verify:
            return None, change
        error = _largest_error(model, change, right)
        if error <= 1 and not _largest_error(model, change, left) <= 1:
            # A pooler or a head reads position 0, which is padding there.
            change = {m: reading_first(cls) for m, cls in change.items()}
            error = max(error, _largest_error(model, change, left))
        return error, change

    def switch(self, model: Any) -> tuple[Callable[[], None], Callable[[], None]]:
        return TransformersAttentionRule().switch(model)

    def fill(self, captured: list[ModuleCall]) -> float | None:
        masks = [call.kwargs.get("attention_mask") for call in captured]
        counts = [(int((m != 0).sum()), m.numel()) for m in masks if isinstance(m, Tensor)]
        if not counts:
            return None
        tokens, positions = map(sum, zip(*counts, strict=True))
        return tokens / positions


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
        ValueError: the captured calls have no mask.
    """
    call = next((c for c in captured if _mask_of(c) is not None), None)
    if call is None:
        if captured:
            raise ValueError("inputs have no attention_mask [batch, length]")
        call = example_calls(model, _BATCH, _LENGTH // 4)[1]
    mask: Any = _mask_of(call)
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
        ValueError: the model has no encoder, or one whose layers are not found.
    """
    copied = replica(model)
    set_training(copied, False)
    names_of = {m: name for name, m in copied.named_modules()}
    with chosen(copied), torch.enable_grad():  # With gradients no layer is one op.
        names = [names_of[m] for m in attending(partial(call.on, copied))]
    found: Change = {}
    for name in names:
        attention = model.get_submodule(name)
        if getattr(attention, "is_causal", True):
            continue
        stack, layer = _stack_of(model, name)
        if stack in found or _has_decoder(stack, model, names):
            continue
        if why := why_no_stack(stack):
            raise ValueError(why)
        cls: Any = packed_stack(type(stack), False)
        found[stack] = cls
        if not cls._has_states:
            for part in layer:
                found[part] = packed_layer(type(part))
    if not found:
        raise ValueError("it has no encoder")
    if model not in found:
        found[model] = padding_reader(type(model))
    return found


def _stack_of(model: nn.Module, name: str) -> tuple[nn.Module, nn.ModuleList]:
    """Return the module whose layers contain the module ``name``, and the list of these.

    It is inside of the innermost model of transformers around that module.
    """
    around = [*ancestors(model, name)]
    first = max(i for i, m in enumerate(around) if isinstance(m, PreTrainedModel))
    for outer, inner in zip(around[first:], around[first + 1 :], strict=False):
        if isinstance(inner, nn.ModuleList):
            return outer, inner
    raise ValueError(f"{name} is in no list of layers")


def _has_decoder(stack: nn.Module, model: nn.Module, names: list[str]) -> bool:
    """Return whether attention inside of ``stack`` is causal: others there attend to memory."""
    inside = set(stack.modules())
    modules = [model.get_submodule(name) for name in names]
    return any(m in inside and getattr(m, "is_causal", True) for m in modules)


def _largest_error(model: Any, classes: Change, call: ModuleCall) -> float:
    """Return the largest error of outputs and gradients at tokens over its budget, in eval mode."""
    exact, stock = replica(model, dtype=torch.float64), replica(model)
    ours = replica(model, classes.get(model), classes=classes)

    def results(call: ModuleCall, draw: int) -> Compared | None:
        with chosen(model):  # All copies share the config.
            expected = _at_tokens(exact, call, draw, torch.float64)
            eager = _at_tokens(stock, call, draw)
            actual = _at_tokens(ours, call, draw)
        if not [len(r) for r in actual] == [len(r) for r in eager] == [len(r) for r in expected]:
            return None
        outputs, gradients = (
            list(zip(*each, strict=True)) for each in zip(actual, expected, eager, strict=True)
        )
        compared = [*outputs, *with_scale(gradients)]
        return {f"result {i}": triple for i, triple in enumerate(compared)}

    draws = (results(call, draw) for draw in range(2, DRAWS + 2))
    return largest_of(results(call, 1), draws)


def _at_tokens(
    model: nn.Module, call: ModuleCall, draw: int, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the floating point results of ``model`` at tokens, and gradients of parameters."""
    set_training(model, False)
    mask: Any = _mask_of(call)
    given = call.map(lambda t: t.to(dtype) if dtype and t.is_floating_point() else t)
    with torch.enable_grad():
        with exactly(dtype):
            result = given.on(model)
        found = [t[mask != 0] if t.shape[:2] == mask.shape else t for t in tensors_in(result)]
        outputs = [t for t in found if t.requires_grad]
        if not outputs:
            raise ValueError("it returns no tensors that depend on its parameters")
        drawn = make_gradients([t.detach().double() for t in outputs], draw)
        drawn = [g.to(t.dtype) for g, t in zip(drawn, outputs, strict=True)]
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        gradients = torch.autograd.grad(outputs, parameters, drawn, allow_unused=True)
    return [t.detach() for t in found], [g for g in gradients if g is not None]
