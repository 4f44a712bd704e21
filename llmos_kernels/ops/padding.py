"""Padded batches without their padding: the tokens alone, one sequence after the other.

    tokens[i] = x[indices[i] // length, indices[i] % length]
    cu_seqlens[b] = number of tokens in sequences 0 to b - 1

``indices`` has the positions of the tokens in x [batch * length, ...], in ascending order. Where
more rows are asked for than there are tokens, the rest is 0, and its indices are -1. The gradient
of the one function is the other: rows that nobody reads get 0, whatever they hold.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmos_kernels._core.registry import _FORCED, check_backend, define, needs_grad
from llmos_kernels.ops._products import is_traced

__all__ = ["Unpadded", "pad_input", "pad_input_reference", "unpad_input", "unpad_input_reference"]


def _indices_reference(mask: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices, cu_seqlens, and four numbers.

    These are the tokens, those of the longest sequence, those beyond ``size``, and the values of
    the mask that are neither 0 nor 1.
    """
    is_token = mask != 0
    lengths = is_token.sum(1)
    # Without waiting for the device: rows that are no tokens, or too many, go to one more place.
    at = is_token.flatten().cumsum(0) - 1
    at = torch.where(is_token.flatten() & (at < size), at, size)
    indices = at.new_full((size + 1,), -1).scatter(
        0, at, torch.arange(at.shape[0], device=at.device)
    )
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    ends = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), size)]).int()
    wrong = (is_token & (mask != 1)).sum()
    total = lengths.sum()
    longest = lengths.max() if lengths.numel() else total
    return indices[:-1], ends, torch.stack([total, longest, (total - size).clamp(min=0), wrong])


def _indices_fake(mask: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        mask.new_empty(size, dtype=torch.int64),
        mask.new_empty(mask.shape[0] + 2, dtype=torch.int32),
        mask.new_empty(4, dtype=torch.int64),
    )


def _gather_reference(x: Tensor, indices: Tensor) -> Tensor:
    if x.shape[0] == 0:
        zeros = x.new_zeros(indices.shape[0], x.shape[1])
        return zeros + x.sum() if x.is_floating_point() else zeros  # It stays differentiable.
    rows = x[indices.clamp(min=0)]
    return torch.where(
        (indices >= 0)[:, None], rows, torch.zeros((), dtype=x.dtype, device=x.device)
    )


def _scatter_reference(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    at = torch.where(indices < 0, rows, indices)
    return x.new_zeros(rows + 1, x.shape[1]).index_copy(0, at, x)[:rows]


find_tokens = define(
    "unpad_indices(Tensor mask, SymInt size) -> (Tensor indices, Tensor ends, Tensor counts)",
    reference=_indices_reference,
    fake=_indices_fake,
)
# Rows [n, d] of any dtype. Indices are contiguous int64; one below 0 has no row.
_gather = define(
    "gather_rows(Tensor x, Tensor indices) -> Tensor",
    reference=_gather_reference,
    fake=lambda x, indices: x.new_empty(indices.shape[0], x.shape[1]),
    triton="padding:gather",
)
# Rows at ascending indices of a result [rows, d]; the others are 0.
_scatter = define(
    "scatter_rows(Tensor x, Tensor indices, SymInt rows) -> Tensor",
    reference=_scatter_reference,
    fake=lambda x, indices, rows: x.new_empty(rows, x.shape[1]),
    triton="padding:scatter",
)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = x.shape[0]
        return _gather(x, indices)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return _scattered(dy, indices, ctx.rows), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(indices)
        return _scatter(x, indices, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return _gathered(dy, indices), None, None


def _gathered(x: Tensor, indices: Tensor) -> Tensor:
    return _Gather.apply(x, indices) if needs_grad(x) else _gather(x, indices)


def _scattered(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    if needs_grad(x):
        return _Scatter.apply(x, indices, rows)
    return _scatter(x, indices, rows)


def _by_reference(backend: str | None) -> bool:
    return (
        check_backend(backend) is not None
        or _FORCED is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


class Unpadded(NamedTuple):
    """What ``unpad_input`` returns.

    Args:
        tokens: [total, ...], the tokens of all sequences, one after the other.
        indices: [total], int64, the position of each in [batch * length, ...].
        cu_seqlens: [batch + 1], int32, where the sequences begin, as
            ``scaled_dot_product_attention`` takes it.
        max_length: the length of the longest sequence.

    Example:
        >>> x, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> unpad_input(x, mask).cu_seqlens
        tensor([0, 2, 5], dtype=torch.int32)
    """

    tokens: Tensor
    indices: Tensor
    cu_seqlens: Tensor
    max_length: int


def _check_mask(mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {mask!r}")
    if mask.ndim != 2:
        raise ValueError(f"mask must be [batch, length], got {list(mask.shape)}")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask must be bool or of integers, 1 at tokens, got {mask.dtype}")


def token_indices(mask: Tensor, max_tokens: int | None = None) -> tuple[Tensor, Tensor, int]:
    """Return the last three members of ``Unpadded`` for a mask; see ``unpad_input``."""
    _check_mask(mask)
    batch, length = mask.shape
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"max_tokens must be 0 or more, got {max_tokens}")
    size = batch * length if max_tokens is None else max_tokens
    indices, ends, counts = find_tokens(mask, size)
    if max_tokens is not None and (mask.is_cuda or is_traced(mask)):
        # Nobody waits for the device: it stops by itself.
        torch._assert_async(counts[2] == 0, "there are more tokens than max_tokens")
        return indices, ends, length
    total, longest, beyond, wrong = counts.tolist()
    if wrong:
        raise ValueError(f"mask must be 1 at tokens and 0 at padding, {wrong} values are neither")
    if max_tokens is not None:
        if beyond:
            raise ValueError(f"there are {total} tokens, more than max_tokens={max_tokens}")
        return indices, ends, longest
    return indices[:total], ends[:-1], longest


def unpad_input(
    x: Tensor, mask: Tensor, *, max_tokens: int | None = None, backend: str | None = None
) -> Unpadded:
    """Return the tokens of a padded batch, one sequence after the other, without the padding.

    Rows, linear layers and norms need no more; attention gets ``cu_seqlens``. The device is waited
    for once, for the number of tokens, unless ``max_tokens`` is given.

    Args:
        x: [batch, length, ...], of any dtype, any strides. A floating one gets a gradient: 0 at
            padding.
        mask: [batch, length], bool or integers: 1 at tokens, 0 at padding, wherever that is.
        max_tokens: the number of rows of the result, a number that tokens never exceed. Rows after
            the tokens are 0, with index -1, and ``cu_seqlens`` [batch + 2] has them as a sequence
            of their own. On a GPU, and in a compiled graph, nothing is waited for then:
            ``max_length`` is ``length``, another value of the mask than 0 counts as a token, and
            more tokens stop the device.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        ``Unpadded``: the tokens [total, ...], their indices, ``cu_seqlens`` and the longest length.

    Raises:
        ValueError: ``x`` does not begin with the shape of ``mask``, which has two dimensions; it
            holds other values than 0 and 1; or there are more tokens than ``max_tokens``.
        TypeError: ``mask`` is floating.

    Example:
        >>> x, mask = torch.randn(2, 128, 512), torch.arange(128) < torch.tensor([[90], [17]])
        >>> tokens, indices, cu_seqlens, _ = unpad_input(x, mask)
        >>> tokens.shape, cu_seqlens.tolist()
        (torch.Size([107, 512]), [0, 90, 107])
    """
    _check_mask(mask)
    if x.shape[:2] != mask.shape:
        raise ValueError(
            f"x must be [batch, length, ...] with a mask [batch, length],"
            f" got {list(x.shape)} and {list(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, x on {x.device}")
    indices, cu_seqlens, longest = token_indices(mask, max_tokens)
    return Unpadded(take_tokens(x, indices, backend), indices, cu_seqlens, longest)


def take_tokens(x: Tensor, indices: Tensor, backend: str | None = None) -> Tensor:
    """Return the rows [total, ...] of ``x`` [batch, length, ...] at ``indices``."""
    rest = x.shape[2:]
    rows = x.reshape(x.shape[0] * x.shape[1], math.prod(rest))
    gather = _gather_reference if _by_reference(backend) else _gathered
    return gather(rows, indices).view(indices.shape[0], *rest)


def pad_input(
    tokens: Tensor, indices: Tensor, batch: int, length: int, *, backend: str | None = None
) -> Tensor:
    """Return tokens in a padded batch again, which is 0 at padding: undoes ``unpad_input``.

    Args:
        tokens: [total, ...], of any dtype, any strides. A floating one gets a gradient.
        indices: [total], int64, as ``unpad_input`` has returned it: ascending, then -1.
        batch: the number of sequences.
        length: the length to which they are padded.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        [batch, length, ...], of the dtype of ``tokens``.

    Raises:
        ValueError: ``indices`` are not as many as ``tokens``, or on another device.
        TypeError: they are not int64.
        RuntimeError: on CPUs, they do not ascend or are outside of the batch. GPUs are not waited
            for: they leave out what is outside.

    Example:
        >>> x, mask = torch.randn(2, 128, 512), torch.arange(128) < torch.tensor([[90], [17]])
        >>> tokens, indices, *_ = unpad_input(x, mask)
        >>> pad_input(torch.nn.functional.gelu(tokens), indices, *mask.shape).shape
        torch.Size([2, 128, 512])
    """
    if tokens.ndim < 1 or indices.shape != tokens.shape[:1]:
        raise ValueError(
            f"expected an index for each of {list(tokens.shape[:1])} tokens,"
            f" got indices {list(indices.shape)}"
        )
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.device != tokens.device:
        raise ValueError(f"indices are on {indices.device}, tokens on {tokens.device}")
    if batch < 0 or length < 0:
        raise ValueError(f"batch and length must be 0 or more, got {batch} and {length}")
    rest = tokens.shape[1:]
    rows = tokens.reshape(tokens.shape[0], math.prod(rest))
    scatter = _scatter_reference if _by_reference(backend) else _scattered
    return scatter(rows, indices.contiguous(), batch * length).view(batch, length, *rest)


def unpad_input_reference(*args: Any, **options: Any) -> Unpadded:
    """Return ``unpad_input`` by its definition, in plain, differentiable torch ops.

    Args:
        *args: as ``unpad_input``, without ``backend``.
        **options: as ``unpad_input``, without ``backend``.

    Returns:
        ``Unpadded``.
    """
    return unpad_input(*args, **options, backend="reference")


def pad_input_reference(*args: Any, **options: Any) -> Tensor:
    """Return ``pad_input`` by its definition, in plain, differentiable torch ops.

    Args:
        *args: as ``pad_input``, without ``backend``.
        **options: as ``pad_input``, without ``backend``.

    Returns:
        [batch, length, ...], of the dtype of ``tokens``.
    """
    return pad_input(*args, **options, backend="reference")
