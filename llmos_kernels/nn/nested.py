"""Nested tensors: batches of sequences of different lengths, without padding.

The sequences are the rows of one tensor [total, width]; ``cu_seqlens`` holds where each of them
begins.
"""

from collections.abc import Callable

import torch
from torch import Tensor


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


def map_rows(nested: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a nested tensor of ``fn`` of the rows of ``nested``, [total, width]; of both layouts.

    ``fn`` may change the width.
    """
    if nested.layout == torch.jagged:
        made = fn(nested.values())
        return torch.nested.nested_tensor_from_jagged(made, nested.offsets())  # type: ignore[attr-defined]
    parts = [t.reshape(-1, nested.size(-1)) for t in nested.unbind()]
    rows = fn(torch.cat(parts))
    lengths = [len(part) for part in parts]
    return torch.nested.as_nested_tensor(list(rows.split(lengths)))
