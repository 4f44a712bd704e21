"""Large 16-bit products on GPUs with a tensor memory accelerator (TMA), Hopper and later.

As many programs as multiprocessors each walk through tiles, so that the epilogue of one tile runs while
the next is loaded. Tensor descriptors load whole tiles without an address a thread; what lies outside
the matrix is 0.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from llmos_kernels._triton.gemm.gemm import TILE, place_tile
from llmos_kernels._triton.runtime import launch, settings

#: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, and the tiles from which on: what keeps to registers with
#: any epilogue. Of the larger each multiprocessor should have two.
_TILES = ((128, 256, 64, 8, 3, 264), (128, 128, 64, 8, 4, 132))
#: The multiprocessors where there is no GPU.
_PROCESSORS = 132


@triton.jit
def place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row and the first column of a tile, which the interpreter counts in Python."""
    return place_tile(tl.full((), tile, tl.int32), M, N, BLOCK_M, BLOCK_N)


@triton.jit
def multiply(a, b, row, col, K, TURNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """The float32 sum of a[row, k] b[k, col]; TURNED: of a[row, k] b[col, k]."""
    row = row.to(tl.int32)
    col = col.to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if TURNED:
            acc = tl.dot(a.load([row, k]), b.load([col, k]).T, acc)
        else:
            acc = tl.dot(a.load([row, k]), b.load([k, col]), acc)
    return acc


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _describable(t: torch.Tensor) -> bool:
    row, inner = t.stride()
    aligned = row * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
    return aligned and inner == 1 and row >= t.shape[1] > 0


def plan(
    kind: str, a: torch.Tensor, b: torch.Tensor, turned: bool
) -> tuple[tuple[int], dict] | None:
    """The programs of a b, or of a b^T if ``turned``, and their arguments; None where the other
    kernels answer: small, float32, not in rows of whole 16 bytes, another GPU, or tuned so."""
    if a.dtype == torch.float32 or not launch.has_engine(a.device):
        return None
    if not _describable(a) or not _describable(b):
        return None
    (m, k), n = a.shape, b.shape[0 if turned else 1]
    tiles: Sequence[tuple] = _TILES
    if found := settings.settings(kind, a, (m, n, k)):
        if not found["persistent"]:
            return None
        tiles = ((*(found[option] for option in TILE[:5]), 1),)
    for block_m, block_n, block_k, warps, stages, least in tiles:
        count = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
        if count < least:
            continue
        blocks = [block_n, block_k] if turned else [block_k, block_n]
        return (min(count, _processors(a.device)),), {
            "a": TensorDescriptor.from_tensor(a, [block_m, block_k]),
            "b": TensorDescriptor.from_tensor(b, blocks),
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
            "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
    return None
