"""Batches without their padding: rows of all sequences one after the other."""

from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.attention import MultiheadAttention, project_in, project_out
from llmos_kernels.nn.hooks import has_hooks
from llmos_kernels.nn.int8 import Int8MultiheadAttention
from llmos_kernels.ops._attention_arguments import MAX_DIM
from llmos_kernels.ops.attention import scaled_dot_product_attention


def packed_rows(nested: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [total, width] of a contiguous nested tensor, and its cu_seqlens."""
    lengths = nested._nested_tensor_size()[:, 0]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    return nested.values().view(-1, nested.size(-1)), cu_seqlens.to(nested.device)


def nested_like(nested: Tensor, rows: Tensor) -> Tensor:
    """``rows`` with the sequences of ``nested``."""
    return torch._nested_view_from_buffer(
        rows.reshape(-1),
        nested._nested_tensor_size(),
        nested._nested_tensor_strides(),
        nested._nested_tensor_storage_offsets(),
    )


def can_pack(attention: nn.Module) -> bool:
    """Whether ``attend_packed`` computes what ``attention`` does."""
    return (
        type(attention) in (nn.MultiheadAttention, MultiheadAttention, Int8MultiheadAttention)
        and bool(attention._qkv_same_embed_dim)
        and attention.bias_k is None
        and not attention.add_zero_attn
        and attention.head_dim <= MAX_DIM
        and not has_hooks(attention)
    )


def attend_packed(attention: nn.MultiheadAttention, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The self-attention of packed sequences ``x`` [total, embed_dim], each to itself."""
    q, k, v = project_in(attention, x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    p = attention.dropout if attention.training else 0.0
    out: Any = scaled_dot_product_attention(
        q, k, v, dropout_p=p, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens
    )
    return project_out(attention, out.flatten(1))
