"""Self-attention of nested tensors: batches of sequences of different lengths, without padding.

The sequences are the rows of one tensor [total, width]; ``cu_seqlens`` holds where each of them
begins.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.attention import MultiheadAttention, project_in, project_out
from llmos_kernels.nn.fusible import is_fusible
from llmos_kernels.nn.int8 import Int8MultiheadAttention
from llmos_kernels.ops._attention_arguments import MAX_DIM
from llmos_kernels.ops.attention import scaled_dot_product_attention


def nested_rows(nested: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows [total, width] of a contiguous nested tensor, and its cu_seqlens (int32)."""
    lengths = nested._nested_tensor_size()[:, 0]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    return nested.values().view(-1, nested.size(-1)), cu_seqlens.to(nested.device)


def nested_like(nested: Tensor, rows: Tensor) -> Tensor:
    """Return ``rows`` [total, width] as a nested tensor with the lengths of ``nested``."""
    return torch._nested_view_from_buffer(
        rows.reshape(-1),
        nested._nested_tensor_size(),
        nested._nested_tensor_strides(),
        nested._nested_tensor_storage_offsets(),
    )


def can_attend_nested(attention: nn.Module) -> bool:
    """Return whether ``attend_nested`` computes what ``attention`` does."""
    return (
        type(attention) in (nn.MultiheadAttention, MultiheadAttention, Int8MultiheadAttention)
        and bool(attention._qkv_same_embed_dim)
        and attention.bias_k is None
        and not attention.add_zero_attn
        and attention.head_dim <= MAX_DIM
        and is_fusible(attention)
    )


def attend_nested(attention: nn.MultiheadAttention, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the self-attention of sequences of different lengths, each to itself.

    Args:
        attention: a module for which ``can_attend_nested`` holds.
        x: [total, embed_dim], the rows of all sequences.
        cu_seqlens: int32 [sequences + 1], where each sequence begins, and ``total``.

    Returns:
        [total, embed_dim].
    """
    q, k, v = project_in(attention, x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    p = attention.dropout if attention.training else 0.0
    out: Any = scaled_dot_product_attention(
        q, k, v, dropout_p=p, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens
    )
    return project_out(attention, out.flatten(1))
