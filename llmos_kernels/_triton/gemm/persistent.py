"""Shared parts of persistent GEMMs, for large 16-bit matrices on ``launch.WGMMA_ARCHS``.

There is one thread block for each multiprocessor, and each computes several tiles in turn, so that
the epilogue of one tile overlaps with the loads of the next. The TMA loads blocks of the operands
through tensor descriptors, so that threads hold no addresses, and reads 0 outside the matrix.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llmos_kernels._triton.gemm.gemm import TILE, tile_origin
from llmos_kernels._triton.runtime import launch, settings

#: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, and the least number of tiles to use them for. They fit
#: the registers with any epilogue. Of the larger tile each multiprocessor should have two.
_TILES = ((128, 256, 64, 8, 3, 264), (128, 128, 64, 8, 4, 132))
#: The number of multiprocessors to assume when compiling without a GPU.
_MULTIPROCESSORS = 132


@triton.jit
def origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first row and column of a tile; in the interpreter its index is a Python int."""
    return tile_origin(tl.full((), tile, tl.int32), M, N, BLOCK_M, BLOCK_N)


@triton.jit
def multiply(a, b, row, col, K, TRANSPOSE_B: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Return the float32 sum of a[row, k] b[k, col]; with TRANSPOSE_B, of a[row, k] b[col, k]."""
    row = row.to(tl.int32)
    col = col.to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if TRANSPOSE_B:
            acc = tl.dot(a.load([row, k]), b.load([col, k]).T, acc)
        else:
            acc = tl.dot(a.load([row, k]), b.load([k, col]), acc)
    return acc


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fits_descriptor(t: Tensor) -> bool:
    """Return True if a tensor descriptor can describe ``t``: contiguous, aligned rows."""
    row, inner = t.stride()
    aligned = row * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
    return aligned and inner == 1 and row >= t.shape[1] > 0


def plan(kind: str, a: Tensor, b: Tensor, transpose_b: bool) -> tuple[tuple[int], dict] | None:
    """Return the grid and arguments of ``a @ b``, or of ``a @ b.mT`` if ``transpose_b``.

    The result is None if the other kernels are to compute the GEMM: if it is small or float32, if
    rows are not aligned to 16 bytes, on other architectures, and where tuning found them faster.
    """
    if a.dtype == torch.float32 or not launch.has_wgmma(a.device):
        return None
    if not _fits_descriptor(a) or not _fits_descriptor(b):
        return None
    (m, k), n = a.shape, b.shape[0 if transpose_b else 1]
    tiles: Sequence[tuple] = _TILES
    if tuned := settings.settings(kind, a, (m, n, k)):
        if not tuned["persistent"]:
            return None
        tiles = ((*(tuned[option] for option in TILE[:5]), 1),)
    for block_m, block_n, block_k, warps, stages, min_tiles in tiles:
        count = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
        if count < min_tiles:
            continue
        blocks = [block_n, block_k] if transpose_b else [block_k, block_n]
        return (min(count, _multiprocessors(a.device)),), {
            "a": TensorDescriptor.from_tensor(a, [block_m, block_k]),
            "b": TensorDescriptor.from_tensor(b, blocks),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "num_warps": warps,
            "num_stages": stages,
        }
    return None
