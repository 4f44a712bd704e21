"""``torch.nn.MultiheadAttention``."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import llmos_kernels.nn as fused
from llmos_kernels.ops._attention_arguments import MAX_DIM
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.proof import judge, outputs_and_gradients
from llmos_kernels.swap.rules.rule import Candidate, Rule, example_batch, tensor_options


class AttentionRule(Rule):
    """Swaps ``nn.MultiheadAttention`` for ``llmos_kernels.nn.MultiheadAttention``."""

    classes: ClassVar = {nn.MultiheadAttention: fused.MultiheadAttention}

    def why_not(self, module: Any) -> str:
        if module.head_dim > MAX_DIM:
            return f"no kernel for a head dim of {module.head_dim}, above {MAX_DIM}"
        if not 0 <= module.dropout < 1:
            return f"dropout with p={module.dropout}"
        return ""

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return calls of causal self-attention, and of cross-attention with padded keys.

        Self-attention is left out where key or value have another width than the query.
        """
        module: Any = candidate.module
        options = tensor_options(module)
        batch, q_len = example_batch(size)
        k_len = q_len + 14

        def random(length: int, width: int) -> Tensor:
            shape = (batch, length) if module.batch_first else (length, batch)
            return torch.randn(*shape, width, **options)

        query, device = random(q_len, module.embed_dim), options["device"]
        causal = torch.ones(q_len, q_len, dtype=torch.bool, device=device).triu(1)
        lengths = torch.randint(1, k_len + 1, (batch, 1), device=device)
        padding = torch.arange(k_len, device=device) >= lengths
        cross = (query, random(k_len, module.kdim), random(k_len, module.vdim))
        calls = [ModuleCall(cross, {"key_padding_mask": padding})]
        if module.kdim == module.vdim == module.embed_dim:
            masked = {"attn_mask": causal, "need_weights": False}
            calls.insert(0, ModuleCall((query,) * 3, masked))
        return calls

    def largest_error(self, candidate: Candidate, call: ModuleCall) -> float:
        """Return the largest error, where torch's result can be compared.

        Where every key of a query is masked, torch may return NaN, and all its gradients are NaN
        then; ours are not. On such a call the outputs are compared elsewhere, and the gradients on
        example calls.
        """
        replicas = self.replicas(candidate)
        if not _has_nan(replicas.exact, call):
            return judge(replicas, call)
        examples = [judge(replicas, example) for example in candidate.example_calls()]
        return max(judge(replicas, call, extent="outputs without NaN"), *examples)


def _has_nan(exact: nn.Module, call: ModuleCall) -> bool:
    """Return whether torch's attention returns NaN on ``call``: a query sees no key."""
    outputs, _ = outputs_and_gradients(exact, call, False, torch.ones_like, torch.float64)
    return any(o.isnan().any() for o in outputs)
