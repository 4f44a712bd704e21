"""The shapes of common models: each module's ``variants`` makes its calls for the pack from them.

The tensors are empty, since calls are recorded and not run. A size stands for all sizes that share
a variant: kernels are specialised on whether 16 divides a size, not on the size itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmos_kernels.ops._attention_arguments import BOTTOM_RIGHT, NOT_CAUSAL, TOP_LEFT

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Widths of hidden states: one for each BLOCK of the row-wise kernels.
WIDTHS = (256, 512, 1024, 2048, 4096)
#: Widths of hidden states and of feed-forward layers, from MiniLM upwards.
FEED_FORWARDS = ((384, 1536), (512, 2048), (768, 3072), (1024, 4096), (2048, 8192), (4096, 16384))
#: Numbers of rows, from a single token to a large batch.
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)


def seed() -> Tensor:
    """Return an empty dropout seed."""
    return torch.empty(2, dtype=torch.int64)


def norms() -> Iterator[tuple[Tensor, Tensor, Tensor | None, int, bool]]:
    """Yield x, weight, bias, width and whether to centre, of LayerNorm and of RMSNorm."""
    for dtype in DTYPES:
        for d in WIDTHS:
            x, weight = torch.empty(64, d, dtype=dtype), torch.empty(d, dtype=dtype)
            yield x, weight, weight, d, True
            yield x, weight, None, d, False


def products() -> Iterator[tuple[torch.dtype, int, int, int]]:
    """Yield dtype, rows, input size and output size of the linear layers of feed-forward blocks."""
    for dtype in DTYPES:
        for d, hidden in FEED_FORWARDS:
            for rows in ROWS:
                yield dtype, rows, d, hidden
                yield dtype, rows, hidden, d


@dataclass(frozen=True)
class Attention:
    """The arguments of one call of each launcher of attention."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    padding: Tensor | None
    causal: int
    dropout_p: float

    @property
    def _options(self) -> tuple:
        """Return scale, causal, dropout_p, softcap and seed."""
        return self.q.shape[-1] ** -0.5, self.causal, self.dropout_p, 0.0, seed()

    @property
    def _stats(self) -> Tensor:
        """Return empty statistics, as the forward pass saves them."""
        return torch.empty(2, *self.q.shape[:3])

    def forward(self) -> tuple:
        """Return the arguments of ``attention.forward.forward``."""
        return self.q, self.k, self.k, self.mask, self.padding, None, None, None, *self._options

    def backward(self) -> tuple:
        """Return the arguments of ``attention.backward.backward``."""
        tensors = self.q, self.k, self.k, self.mask, self.padding, None, None, None
        bias = self.mask is not None and self.mask.is_floating_point()
        return self.q, *tensors, self.q.transpose(1, 2), self._stats, *self._options, bias

    def weights(self, mean: bool) -> tuple:
        """Return the arguments of ``attention.weights.weights``."""
        return self.q, self.k, self.mask, self.padding, self._stats, *self._options, mean


#: Head dims of MiniLM (32), of BERT, GPT-2 and T5 (64), and of larger models; float32 takes the
#: first two.
_HEAD_DIMS = (32, 64, 128)
#: Kinds of calls: attn_mask (None, "keys", "whole", "bias"), key padding or not, causal, dropout_p.
#: A "keys" mask is bool [batch, 1, 1, k_len], a "whole" one bool [batch, 1, q_len, k_len], a "bias"
#: float.
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
#: The kinds of calls for short sentences, whose tiles have as few rows as there are queries.
SHORT = (*PADDED, ("keys", False, NOT_CAUSAL, 0.0))
#: The kinds of calls for decoding.
DECODED = (*PADDED, ("keys", False, NOT_CAUSAL, 0.0), (None, False, BOTTOM_RIGHT, 0.0))


def attention(
    kinds: Sequence[tuple], queries: int = 0, lengths: Sequence[int] = (1024, 1000)
) -> Iterator[Attention]:
    """Yield calls of these kinds with ``queries`` queries, or as many as keys if that is 0.

    Calls with a mask or padding take all of ``lengths`` as the number of keys, since it matters to
    them whether 16 divides the length of a mask's row; the others take those that 16 divides.
    """
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
