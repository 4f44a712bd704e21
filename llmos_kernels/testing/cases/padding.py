"""Cases of padded batches and their tokens. A shape is (batch, length, d)."""

from typing import Any

import torch
from torch import Tensor

from llmos_kernels.ops import padding
from llmos_kernels.testing.cases.case import Case

#: Rows for more tokens than there are.
_SPARE = 3


def _sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the numbers of positions and of tokens, some half of them."""
    positions = shape[0] * shape[1]
    return positions, (positions + 1) // 2


def _mask(shape: tuple[int, ...], device: Any) -> Tensor:
    """Return a mask with tokens at random positions."""
    positions, total = _sizes(shape)
    mask = torch.zeros(positions, dtype=torch.bool, device=device)
    mask[torch.randperm(positions, device=device)[:total]] = True
    return mask.view(shape[:2])


def _make_batch(shape: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, **options), _mask(shape, options.get("device"))


def _make_tokens(shape: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor]:
    rows = _sizes(shape)[1] + _SPARE
    return torch.randn(rows, *shape[2:], **options), _mask(shape, options.get("device"))


def _unpad(x: Tensor, mask: Tensor, **options: Any) -> Tensor:
    most = _sizes(x.shape)[1] + _SPARE
    return padding.unpad_input(x, mask, max_tokens=most, **options).tokens


def _unpad_eager(x: Tensor, mask: Tensor) -> Tensor:
    rows = x.flatten(0, 1)[mask.flatten().nonzero().squeeze(1)]
    return torch.cat([rows, rows.new_zeros(_SPARE, *rows.shape[1:])])


def _pad(tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
    indices, *_ = padding.token_indices(mask, tokens.shape[0])
    return padding.pad_input(tokens, indices, *mask.shape, **options)


def _pad_eager(tokens: Tensor, mask: Tensor) -> Tensor:
    at = mask.flatten().nonzero().squeeze(1)
    out = tokens.new_zeros(mask.numel(), *tokens.shape[1:])
    return out.index_copy(0, at, tokens[: len(at)]).view(*mask.shape, *tokens.shape[1:])


def _pad_reference(tokens: Tensor, mask: Tensor) -> Tensor:
    return _pad(tokens, mask, backend="reference")


def _unpad_reference(x: Tensor, mask: Tensor) -> Tensor:
    return _unpad(x, mask, backend="reference")


#: Empty, one element, primes, powers of two and their neighbours, wider than a block.
_SHAPES = ((0, 3, 8), (2, 0, 8), (1, 1, 1), (2, 3, 129), (5, 17, 64), (3, 2, 20011))
_OPTIONS: Any = {
    "shapes": _SHAPES,
    "benchmark_shapes": ((8, 128, 768), (64, 128, 384)),
    "gpu_benchmark_shapes": ((256, 512, 768),),
    "gradcheck_shape": (2, 3, 5),
    "multi_block_shape": (5, 13, 2049),
    "row_wise": False,
    "any_dtype": True,
}

PADDING = (
    Case("unpad", _unpad, _unpad_reference, _unpad_eager, _make_batch, **_OPTIONS),
    Case("pad", _pad, _pad_reference, _pad_eager, _make_tokens, **_OPTIONS),
)
