"""Triton kernels that copy rows to and from padded batches; ``ops/padding.py`` describes them."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.rows import as_rows
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel

#: Elements of a thread block.
_BLOCK = 1024


@kernel(do_not_specialize=["N", "PIECES"])
def _copy_kernel(x, indices, out, stride, N, D, PIECES, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
    """Copy a piece of a row to or from the place that its index says; no index, no row."""
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    col = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(indices + row)
    known = (at >= 0) & (at < N)
    inside = col < D
    if SCATTER:
        tl.store(out + at * D + col, tl.load(x + row * stride + col, inside), inside & known)
    else:
        v = tl.load(x + at * stride + col, inside & known, 0)
        tl.store(out + row * D + col, v, inside)


def _copy(x: Tensor, indices: Tensor, out: Tensor, rows: int, scatter: bool) -> Tensor:
    d = x.shape[1]
    if len(indices) and d:
        view, stride = as_rows(x, d)
        pieces = triton.cdiv(d, _BLOCK)
        block = min(triton.next_power_of_2(d), _BLOCK)
        _copy_kernel[(len(indices) * pieces,)](
            view, indices, out, stride, rows, d, pieces, SCATTER=scatter, BLOCK=block, num_warps=4
        )
    return out


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """Return what ``llmos::gather_rows`` does."""
    return _copy(x, indices, x.new_empty(len(indices), x.shape[1]), len(x), False)


def scatter(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    """Return what ``llmos::scatter_rows`` does."""
    return _copy(x, indices, x.new_zeros(rows, x.shape[1]), rows, True)


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    indices = torch.empty(64, dtype=torch.int64)
    rows = [torch.empty(64, d, dtype=t) for t in pack_shapes.DTYPES for d in pack_shapes.WIDTHS]
    for x in (*rows, indices[:, None]):  # Tokens are ids, too.
        yield gather, (x, indices)
        yield scatter, (x, indices, 256)
