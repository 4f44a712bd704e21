"""The rule of ``optimize(skip_padding=True)`` for the stacks of torch."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.packed_transformer import STACKS, Transformer, why_not
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.padding import CannotSkipError, Change, PaddingCandidate, PaddingRule
from llmos_kernels.swap.padding_proof import largest_error
from llmos_kernels.swap.rules.rule import (
    ancestors,
    example_batch,
    tensor_options,
    why_untouchable,
)

_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask")


class StackPaddingRule(PaddingRule):
    """Lets ``nn.TransformerEncoder`` and ``nn.TransformerDecoder`` compute tokens alone."""

    def candidates(self, model: nn.Module) -> Iterator[PaddingCandidate]:
        """Yield the stacks in ``model``, those of an ``nn.Transformer`` with it."""
        inside: set[nn.Module] = set()
        for name, module in model.named_modules():
            if type(module) is nn.Transformer:
                inside.update(module.modules())
            if type(module) is nn.Transformer or (type(module) in STACKS and module not in inside):
                why = why_untouchable(module, ancestors(model, name))
                yield PaddingCandidate(name, module, self, why)

    def change(
        self, model: Any, captured: list[ModuleCall], verify: bool, is_whole: bool
    ) -> tuple[float | None, Change]:
        stacks = [m for m in model.modules() if type(m) in STACKS]
        for stack in stacks:
            if why := why_not(stack):
                raise CannotSkipError(why)
        if not stacks:
            raise CannotSkipError("its stacks are not those of torch")
        change: Change = {stack: STACKS[type(stack)] for stack in stacks}
        if type(model) is nn.Transformer:
            change[model] = Transformer
        if not verify:
            return None, change
        padded = [c for c in captured if _masks_of(model, c)]
        if captured and not padded:
            raise CannotSkipError("inputs have no padding here")
        call = padded[0] if padded else _example_call(model)
        return largest_error(model, change, call, lambda c, out: _at_tokens(model, c, out)), change

    def is_token(self, model: Any, call: ModuleCall) -> Tensor | None:
        masks = _masks_of(model, call)
        is_decoder = not isinstance(model, nn.TransformerEncoder)
        own = masks.get("tgt_key_padding_mask" if is_decoder else "src_key_padding_mask")
        return None if own is None else ~_hidden(own)


def _hidden(mask: Tensor) -> Tensor:
    """Return a key padding mask as bool, True where a key is ignored."""
    return mask if mask.dtype == torch.bool else mask == float("-inf")


def _masks_of(stack: nn.Module, call: ModuleCall) -> dict[str, Any]:
    """Return the padding masks of a call that are tensors, by their names."""
    given = inspect.signature(stack.forward).bind(*call.args, **call.kwargs).arguments
    return {k: given[k] for k in _PADDING if isinstance(given.get(k), Tensor)}


def _at_tokens(stack: Any, call: ModuleCall, results: list[Tensor]) -> list[Tensor]:
    """Return the result of a stack at tokens."""
    is_token = StackPaddingRule().is_token(stack, call)
    if is_token is None:
        return results
    first = _attention_of(stack).batch_first
    return [t[is_token] if first else t.transpose(0, 1)[is_token] for t in results]


def _example_call(stack: Any) -> ModuleCall:
    """Return a call with random inputs and key padding."""
    batch, length = example_batch(None)
    options = tensor_options(stack)
    attention = _attention_of(stack)

    def draw(length: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch, length, attention.embed_dim, **options)
        lengths = torch.randint(1, length + 1, (batch, 1), device=x.device)
        padding = torch.arange(length, device=x.device) >= lengths
        return (x if attention.batch_first else x.transpose(0, 1)), padding

    x, padding = draw(length)
    if isinstance(stack, nn.TransformerEncoder):
        return ModuleCall((x,), {"src_key_padding_mask": padding})
    memory, memory_padding = draw(length + 2)
    given = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": memory_padding}
    if isinstance(stack, nn.Transformer):
        return ModuleCall((memory, x), given | {"src_key_padding_mask": memory_padding})
    return ModuleCall((x, memory), given)


def _attention_of(stack: Any) -> Any:
    """Return the first attention of a stack."""
    return next(m for m in stack.modules() if isinstance(m, nn.MultiheadAttention))
