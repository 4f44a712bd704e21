"""Batches without their padding inside of modules: all tokens are the rows of one sequence.

``Packed`` goes through layers in the place of an attention mask.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmos_kernels.ops.attention import scaled_dot_product_attention
from llmos_kernels.ops.padding import find_tokens, pad_input, take_tokens


class Packed:
    """Where the tokens of a padded batch are. Rows are [1, total, ...].

    Args:
        indices: [total], the position of each token in [batch * length, ...]; None: all are tokens.
        cu_seqlens: [batch + 1], int32.
        batch: the number of sequences.
        length: the length to which they are padded.
    """

    __slots__ = ("batch", "cu_seqlens", "indices", "length")

    def __init__(self, indices: Tensor | None, cu_seqlens: Tensor, batch: int, length: int) -> None:
        self.indices, self.cu_seqlens = indices, cu_seqlens
        self.batch, self.length = batch, length

    @classmethod
    def of(cls, is_token: Tensor, unless: Sequence[Tensor] = ()) -> "Packed | None":
        """Return the pack of a mask [batch, length], True at tokens; None where padding is read.

        Where everything is padding there is none, either. The device is waited for once.

        Args:
            is_token: the mask.
            unless: bool tensors without dimensions; one that is True says that padding is read.
        """
        batch, length = is_token.shape
        indices, ends, counts = find_tokens(is_token, is_token.numel())
        total, *read = torch.stack([counts[0], *(t.long() for t in unless)]).tolist()
        if any(read) or total == 0:
            return None
        if total == batch * length:
            return cls.whole(batch, length, is_token.device)
        return cls(indices[:total], ends[:-1], batch, length)

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> "Packed":
        """Return the pack of a batch without padding."""
        ends = torch.arange(0, batch * length + 1, max(length, 1), dtype=torch.int32, device=device)
        return cls(None, ends, batch, length)

    @property
    def is_whole(self) -> bool:
        """Whether there is no padding."""
        return self.indices is None

    @property
    def total(self) -> int:
        """The number of tokens."""
        return self.batch * self.length if self.indices is None else self.indices.shape[0]

    def is_padded(self, x: Any) -> bool:
        """Return whether ``x`` is a tensor [batch, length, ...]."""
        return isinstance(x, Tensor) and x.shape[:2] == (self.batch, self.length)

    def take(self, x: Tensor) -> Tensor:
        """Return the tokens [1, total, ...] of ``x`` [batch or 1, length, ...]."""
        if x.shape[0] not in (1, self.batch) or x.shape[1] != self.length:
            raise ValueError(
                f"expected [{self.batch} or 1, {self.length}, ...], got {list(x.shape)}"
            )
        if self.indices is None:
            return x.expand(self.batch, *x.shape[1:]).reshape(1, self.total, *x.shape[2:])
        if x.shape[0] == self.batch:
            return take_tokens(x, self.indices)[None]
        return take_tokens(x, self.indices % self.length)[None]

    def put(self, rows: Tensor) -> Tensor:
        """Return [batch, length, ...] of rows [1, total, ...]; 0 at padding."""
        if self.indices is None:
            return rows.reshape(self.batch, self.length, *rows.shape[2:])
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


class PackedKeys(NamedTuple):
    """What attention takes in the place of a key padding mask, where its inputs are packed.

    Args:
        queries: the batch of the queries.
        keys: the batch of the keys.
        is_causal: whether query i of a sequence sees keys up to i alone.
    """

    queries: Packed
    keys: Packed
    is_causal: bool = False


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
