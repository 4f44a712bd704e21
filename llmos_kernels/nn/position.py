"""Positions that are computed, not learned."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels.ops._dropout import check_dropout


class SinusoidalPositionalEncoding(torch.nn.Module):
    """``dropout(input + table[offset : offset + length])``, with

        table[t, 2i] = sin(t / 10000^(2i / d_model)),   table[t, 2i + 1] = cos of the same.

    ``input`` is [batch, length, d_model], [length, batch, d_model] where not ``batch_first``, or
    [length, d_model]. The table is computed in float64 and kept in float32 outside the state dict;
    each call rounds what it adds to the dtype of ``input``. ``offset`` is the position of the first
    token, for decoding with a cache. Raises ValueError for a ``d_model`` or ``max_len`` below 1, a
    ``dropout`` outside [0, 1), another width or shape, or positions outside the table.
    Vaswani et al. 2017, arXiv:1706.03762.
    """

    table: Tensor

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        batch_first: bool = True,
        device=None,
    ) -> None:
        if d_model < 1 or max_len < 1:
            raise ValueError(f"d_model and max_len must be at least 1, got {d_model}, {max_len}")
        check_dropout(dropout)
        super().__init__()
        self.d_model, self.max_len = d_model, max_len
        self.dropout, self.batch_first = dropout, batch_first
        at = torch.arange(max_len, dtype=torch.float64)[:, None]
        even = torch.arange(0, d_model, 2, dtype=torch.float64)
        angles = at * torch.pow(10000.0, -even / d_model)
        table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :d_model]
        self.register_buffer("table", table.float().to(device), persistent=False)

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        if input.ndim not in (2, 3) or input.shape[-1] != self.d_model:
            raise ValueError(
                f"input must be [..., {self.d_model}] of 2 or 3 dimensions, got {list(input.shape)}"
            )
        length = input.shape[-2 if self.batch_first or input.ndim == 2 else 0]
        if offset < 0 or offset + length > self.max_len:
            raise ValueError(
                f"positions {offset} to {offset + length} are outside of max_len={self.max_len}"
            )
        added = self.table[offset : offset + length].to(input.dtype)
        if input.ndim == 3 and not self.batch_first:
            added = added[:, None]
        return F.dropout(input + added, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}, dropout={self.dropout}"
