"""Batches without their padding inside of modules: all tokens are the rows of one sequence.

``Packed`` goes through layers in the place of an attention mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmos_kernels.ops.attention import scaled_dot_product_attention
from llmos_kernels.ops.padding import find_tokens, pad_input, take_tokens


class Packed:
    """Where the tokens of a padded batch are. Rows are [1, total, ...].

    Args:
        indices: [total], the position of each token in [batch * length, ...].
        cu_seqlens: [batch + 1], int32.
        batch: the number of sequences.
        length: the length to which they are padded.
    """

    __slots__ = ("batch", "cu_seqlens", "indices", "length")

    def __init__(self, indices: Tensor, cu_seqlens: Tensor, batch: int, length: int) -> None:
        self.indices, self.cu_seqlens = indices, cu_seqlens
        self.batch, self.length = batch, length

    @classmethod
    def of(cls, is_token: Tensor, unless: Sequence[Tensor] = ()) -> "Packed | None":
        """Return the pack of a mask [batch, length], True at tokens; None if it is not worth one.

        That is where nothing is padding, or everything. The device is waited for once.

        Args:
            is_token: the mask.
            unless: bool tensors without dimensions; one that is True says that padding is read.
        """
        batch, length = is_token.shape
        indices, ends, counts = find_tokens(is_token, is_token.numel())
        total, *read = torch.stack([counts[0], *(t.long() for t in unless)]).tolist()
        if any(read) or total in (0, batch * length):
            return None
        return cls(indices[:total], ends[:-1], batch, length)

    @property
    def total(self) -> int:
        """The number of tokens."""
        return self.indices.shape[0]

    def is_padded(self, x: Any) -> bool:
        """Return whether ``x`` is a tensor [batch, length, ...]."""
        return isinstance(x, Tensor) and x.shape[:2] == (self.batch, self.length)

    def take(self, x: Tensor) -> Tensor:
        """Return the tokens [1, total, ...] of ``x`` [batch or 1, length, ...]."""
        if x.shape[0] == self.batch:
            return take_tokens(x, self.indices)[None]
        return take_tokens(x, self.indices % self.length)[None]

    def put(self, rows: Tensor) -> Tensor:
        """Return [batch, length, ...] of rows [1, total, ...]; 0 at padding."""
        return pad_input(rows[0], self.indices, self.batch, self.length)

    def padded(self, result: Any) -> Any:
        """Return a result of a layer or a model with all rows in it put back."""
        if isinstance(result, Tensor):
            return self.put(result) if result.shape[:2] == (1, self.total) else result
        if type(result) in (tuple, list):
            return type(result)(map(self.padded, result))
        if isinstance(result, dict):  # A ModelOutput keeps its attributes beside its items.
            for name, value in list(result.items()):
                result[name] = self.padded(value)
        return result


def attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, **options: Any
) -> Tensor:
    """Return the attention of varlen sequences, which follow one another in a batch of 1.

    Args:
        query: [1, heads, total, head_dim].
        key: the same of the keys.
        value: the same of the values.
        cu_q: int32, where the sequences begin.
        cu_k: the same of the keys.
        options: those of ``scaled_dot_product_attention``.

    Returns:
        [1, total, heads, v_dim].
    """
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    out: Any = scaled_dot_product_attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options
    )
    return out.unsqueeze(0)
