"""Position encodings that are computed, not learned."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels.ops._dropout import check_dropout
from llmos_kernels.ops._products import is_traced


class SinusoidalPositionalEncoding(torch.nn.Module):
    """Adds a sinusoidal position encoding: ``dropout(input + table[offset : offset + length])``.

        table[t, 2i] = sin(t / 10000^(2i / d_model)),   table[t, 2i + 1] = cos of the same.

    The table is computed in float64, rounded to float32, and made when a device first needs it: it
    is no buffer, so that changes of the module's dtype or device do not reach it. Each call rounds
    its rows to the dtype of ``input``.

    Args:
        d_model: the width of the input.
        max_len: the number of positions in the table.
        dropout: the probability of dropping an element in training.
        batch_first: whether the input is [batch, length, d_model], else [length, batch, d_model].
        device: unused; the table is on the device of the input.

    Returns:
        ``forward(input, offset=0)`` takes and returns a tensor of the shape above, or [length,
        d_model]. ``offset`` is the position of the first token, for decoding with a KV cache.

    Raises:
        ValueError: ``d_model`` or ``max_len`` is below 1, ``dropout`` outside [0, 1), the input has
            another shape, or positions are outside of the table.

    Example:
        >>> SinusoidalPositionalEncoding(512)(torch.zeros(8, 128, 512)).shape
        torch.Size([8, 128, 512])

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    _table: Tensor | None

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        batch_first: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if d_model < 1 or max_len < 1:
            raise ValueError(f"d_model and max_len must be at least 1, got {d_model}, {max_len}")
        check_dropout(dropout)
        super().__init__()
        self.d_model, self.max_len = d_model, max_len
        self.dropout, self.batch_first = dropout, batch_first
        self._table = None

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
        added = self._rows(offset, length, input).to(input.dtype)
        if input.ndim == 3 and not self.batch_first:
            added = added[:, None]
        return F.dropout(input + added, self.dropout, self.training)

    def _rows(self, offset: int, length: int, input: Tensor) -> Tensor:
        """Return rows [offset, offset + length) of the table, on the device of ``input``."""
        if is_traced(input):  # A graph computes its rows: what is traced must not be stored.
            return _encoding(offset, offset + length, self.d_model, input.device)
        if self._table is None or self._table.device != input.device:
            self._table = _encoding(0, self.max_len, self.d_model, input.device)
        return self._table[offset : offset + length]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}, dropout={self.dropout}"


def _encoding(begin: int, end: int, d_model: int, device: torch.device) -> Tensor:
    """Return the encoding of positions [begin, end), float32 [end - begin, d_model]."""
    options: Any = {"dtype": torch.float64, "device": device}
    position = torch.arange(begin, end, **options)[:, None]
    even = torch.arange(0, d_model, 2, **options)
    angles = position * torch.pow(10000.0, -even / d_model)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :d_model].float()
