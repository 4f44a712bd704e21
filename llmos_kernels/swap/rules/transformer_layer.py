"""``torch.nn.TransformerEncoderLayer`` and ``torch.nn.TransformerDecoderLayer``."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import llmos_kernels.nn as fused
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.proof import judge
from llmos_kernels.swap.rules._kinks import largest_error_without_kinks
from llmos_kernels.swap.rules.rule import Candidate, Rule, example_batch, tensor_options

#: The memory of a decoder layer is longer than its target by this many positions.
_LONGER_MEMORY = 5


class TransformerLayerRule(Rule):
    """Swaps torch's Transformer layers for those of ``llmos_kernels.nn``."""

    classes: ClassVar = {
        nn.TransformerEncoderLayer: fused.TransformerEncoderLayer,
        nn.TransformerDecoderLayer: fused.TransformerDecoderLayer,
    }

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return a call with a causal mask and padding, and one without masks.

        A decoder layer also gets a memory, whose padding is masked in the first call.
        """
        module = candidate.module
        attention: Any = module.self_attn
        options = tensor_options(module)
        batch, length = example_batch(size)
        device = options["device"]

        def random(length: int) -> Tensor:
            shape = (batch, length) if attention.batch_first else (length, batch)
            return torch.randn(*shape, attention.embed_dim, **options)

        def padding(length: int) -> Tensor:
            lengths = torch.randint(1, length + 1, (batch, 1), device=device)
            return torch.arange(length, device=device) >= lengths

        causal = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        if isinstance(module, nn.TransformerEncoderLayer):
            masks = {"src_mask": causal, "src_key_padding_mask": padding(length)}
            return [ModuleCall((random(length),), masks), ModuleCall((random(length),))]
        args, masks = (random(length), random(length + _LONGER_MEMORY)), {"tgt_mask": causal}
        masks |= {"memory_key_padding_mask": padding(length + _LONGER_MEMORY)}
        return [ModuleCall(args, masks), ModuleCall(args)]

    def largest_error(self, candidate: Candidate, call: ModuleCall) -> float:
        """Return the largest error, also at inference, where an encoder layer is one op.

        Gradients are compared away from kinks of the activation.
        """
        inference = judge(self.replicas(candidate), call, extent="inference")
        return max(inference, largest_error_without_kinks(candidate, call))
