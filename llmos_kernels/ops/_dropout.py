"""The dropout mask of all ops: Philox4x32-7, the same bits in the reference, Triton, CUDA and C++.

    word(row, col) = philox(counter=(col // 4, row, row >> 32, offset), key=seed)[col % 4]
    dropped        = word < floor(p * 2^32)
    dropout(x)     = 0 where dropped, else x / (1 - p)

``x`` is [rows, cols]. A mask is determined by a ``seed`` tensor [2] (int64: seed, offset) on the
device of ``x``, drawn from torch's default generator, and saved as nothing else: the backward
computes it again, and a replayed CUDA graph draws a new seed. Salmon et al., SC 2011, who show that
seven rounds pass every test of BigCrush; FlashAttention takes as many.
"""

import torch
from torch import Tensor

from llmos_kernels._core.errors import ArgumentError

__all__: list[str] = []

#: Rounds of Philox.
ROUNDS = 7
_LOW = 0xFFFFFFFF  # The lower 32 bits of an int64.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_seed(device: torch.device) -> Tensor:
    """Return a seed and an offset [2], int64, from the default generator of ``device``."""
    return torch.randint(torch.iinfo(torch.int64).max, (2,), device=device)


def check_dropout(p: float) -> None:
    """Raise ArgumentError unless ``p`` is in [0, 1)."""
    if not 0 <= p < 1:
        raise ArgumentError(f"dropout_p must be in [0, 1), got {p}")


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four words of 32 bits for each counter, as int64 tensors; arguments broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products wrap in int64; the mask after the shift leaves the unsigned upper half.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            (p0 >> 32 & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """Return which elements [rows, cols] dropout with ``seed`` keeps, bool."""
    row = torch.arange(rows, device=seed.device)[:, None]
    group = torch.arange((cols + 3) // 4, device=seed.device)[None]
    counter = (group, row & _LOW, row >> 32 & _LOW, seed[1] & _LOW)
    words = philox(counter, (seed[0] & _LOW, seed[0] >> 32 & _LOW))
    word = torch.stack(words, -1).flatten(1)[:, :cols]
    return word >= int(p * 2**32)


def dropout_reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return dropout of ``x`` [rows, cols], rounded once to the dtype of ``x``."""
    acc = torch.promote_types(x.dtype, torch.float32)
    factor = keep_mask(seed, x.shape[0], x.shape[1], p).to(acc) * (1 / (1 - p))
    return (x.to(acc) * factor).to(x.dtype)
