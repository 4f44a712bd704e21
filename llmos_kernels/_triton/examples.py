"""What models commonly have, for the ``variants`` of each module: the calls, on tensors that are not
filled, whose kernels the ahead-of-time pack holds. Sizes stand for all that a kernel is not compiled
for: what divides by 16, and what does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmos_kernels.ops._attention_arguments import BOTTOM_RIGHT, NOT_CAUSAL, TOP_LEFT

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Widths of hidden states, one for each block of the row-wise kernels.
WIDTHS = (256, 512, 1024, 2048, 4096)
#: Widths of hidden states and of feed-forward blocks, from MiniLM on.
FEED_FORWARDS = ((384, 1536), (512, 2048), (768, 3072), (1024, 4096), (2048, 8192), (4096, 16384))
#: Rows, from one token to a large batch.
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)


def seed() -> Tensor:
    return torch.empty(2, dtype=torch.int64)


def norms() -> Iterator[tuple[Tensor, Tensor, Tensor | None, int, bool]]:
    """Rows, weight, bias, width, and whether they are centred: LayerNorm and RMSNorm."""
    for dtype in DTYPES:
        for d in WIDTHS:
            x, weight = torch.empty(64, d, dtype=dtype), torch.empty(d, dtype=dtype)
            yield x, weight, weight, d, True
            yield x, weight, None, d, False


def products() -> Iterator[tuple[torch.dtype, int, int, int]]:
    """Dtype, rows, inner and outer size of both products of feed-forward blocks."""
    for dtype in DTYPES:
        for d, hidden in FEED_FORWARDS:
            for rows in ROWS:
                yield dtype, rows, d, hidden
                yield dtype, rows, hidden, d


@dataclass(frozen=True)
class Attention:
    """One call of each launcher of attention."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    padding: Tensor | None
    causal: int
    dropout_p: float

    @property
    def _options(self) -> tuple:
        return self.q.shape[-1] ** -0.5, self.causal, self.dropout_p, seed()

    @property
    def _stats(self) -> Tensor:
        return torch.empty(2, *self.q.shape[:3])

    def forward(self) -> tuple:
        return self.q, self.k, self.k, self.mask, self.padding, None, None, *self._options

    def backward(self) -> tuple:
        tensors = self.q, self.k, self.k, self.mask, self.padding, None, None
        bias = self.mask is not None and self.mask.is_floating_point()
        return self.q, *tensors, self.q.transpose(1, 2), self._stats, *self._options, bias

    def weights(self, mean: bool) -> tuple:
        return self.q, self.k, self.mask, self.padding, self._stats, *self._options, mean


#: Head dims of MiniLM, of BERT, GPT-2 and T5, and of larger models; float32 up to BERT's.
_HEAD_DIMS = (32, 64, 128)
#: A mask ("keys", "whole", "bias"), padding, causal or not, dropout.
PADDED = ((None, False, NOT_CAUSAL, 0.0), (None, True, NOT_CAUSAL, 0.0))
PLAIN_AND_MASKED = (
    *PADDED,
    (None, False, TOP_LEFT, 0.0),
    (None, False, BOTTOM_RIGHT, 0.0),
    (None, True, TOP_LEFT, 0.0),
    ("keys", False, NOT_CAUSAL, 0.0),
    ("whole", False, NOT_CAUSAL, 0.0),
    ("bias", False, NOT_CAUSAL, 0.0),
    (None, False, NOT_CAUSAL, 0.1),
    (None, False, TOP_LEFT, 0.1),
    (None, True, NOT_CAUSAL, 0.1),
)
#: Of sentences: a tile of queries is as short as they are.
SHORT = (*PADDED, ("keys", False, NOT_CAUSAL, 0.0))
DECODED = (*PADDED, ("keys", False, NOT_CAUSAL, 0.0), (None, False, BOTTOM_RIGHT, 0.0))


def attention(
    kinds: Sequence[tuple], queries: int = 0, lengths: Sequence[int] = (1024, 1000)
) -> Iterator[Attention]:
    """Calls of these kinds: as many queries as keys, or ``queries``. Where there is a mask its rows are
    whole 16 elements, or not: all of ``lengths``, else those that 16 divides."""
    for dtype in DTYPES:
        for d in _HEAD_DIMS[: 2 if dtype == torch.float32 else None]:
            for mask_kind, padded, causal, p in kinds:
                for keys in (n for n in lengths if mask_kind or padded or n % 16 == 0):
                    rows = queries or keys
                    q, k = (
                        torch.empty(2, n, 12, d, dtype=dtype).transpose(1, 2) for n in (rows, keys)
                    )
                    shape = {"keys": (2, 1, 1, keys), "bias": (1, 12, rows, keys)}
                    mask = None
                    if mask_kind:
                        kind = dtype if mask_kind == "bias" else torch.bool
                        mask = torch.empty(shape.get(mask_kind, (2, 1, rows, keys)), dtype=kind)
                    padding = torch.empty(2, keys, dtype=torch.bool) if padded else None
                    yield Attention(q, k, mask, padding, causal, p)
