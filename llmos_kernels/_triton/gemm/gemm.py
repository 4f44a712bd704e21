"""Shared parts of the GEMMs: the position of a tile, its main loop, split-K and the launch rule.

A GEMM is [M, N] = a [M, K] b [K, N], with any strides: a transposed operand has its strides
exchanged. A thread block computes one tile of the result over a part of K. If there are too few
tiles to fill the GPU, K is split into parts, and a second kernel adds the float32 sums of the parts
in a fixed order. Sizes are int32, offsets int64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.runtime import settings
from llmos_kernels._triton.runtime.launch import kernel

#: How many rows of tiles are computed together, so that thread blocks that run at the same time
#: share both operands in the L2 cache.
_GROUP: tl.constexpr = tl.constexpr(8)


@triton.jit
def part_and_origin(M, N, PARTS, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return this thread block's part of K, and the first row and column of its tile."""
    row, col = tile_origin(tl.program_id(0) // PARTS, M, N, BLOCK_M, BLOCK_N)
    return tl.program_id(0) % PARTS, row, col


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first row and column of the tile with index ``tile``."""
    rows = tl.cdiv(M, BLOCK_M)
    cols = tl.cdiv(N, BLOCK_N)
    group = tile // (_GROUP * cols)
    height = tl.minimum(rows - group * _GROUP, _GROUP)
    tile %= _GROUP * cols
    row = (group * _GROUP + tile % height).to(tl.int64) * BLOCK_M
    return row, (tile // height).to(tl.int64) * BLOCK_N


@triton.jit
def part_span(part, K, PART_LENGTH):
    """Return where a part of K starts, how long it is, and how much of K follows its start.

    Loads are masked by the last, not by the length: Triton can prove that 16 divides it if 16
    divides K.
    """
    first = part.to(tl.int64) * PART_LENGTH
    rest = (K - first).to(tl.int32)
    return first, tl.minimum(rest, PART_LENGTH), rest


@triton.jit
def multiply(a, b, row, col, part, M, N, K, PART_LENGTH, a_row, a_inner, b_inner, b_col,
             SKIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """Return the float32 sum of a[row, k] b[k, col] over a part of K.

    With SKIP, b[k] is not loaded where a[row, k] is 0 for all rows of the tile.
    """
    k = tl.arange(0, BLOCK_K)
    first, length, rest = part_span(part, K, PART_LENGTH)
    a += row[:, None] * a_row + (first + k)[None, :] * a_inner
    b += (first + k)[:, None] * b_inner + col[None, :] * b_col
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, length, BLOCK_K):
        inside = k < rest - start
        x = tl.load(a, (row < M)[:, None] & inside[None, :], 0.0)
        if SKIP:
            inside = tl.max((x != 0).to(tl.int32), 0) > 0
        y = tl.load(b, inside[:, None] & (col < N)[None, :], 0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee")
        a += step * a_inner
        b += step * b_inner
    return acc


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the left and right half of a tile: handling one at a time needs fewer registers."""
    return tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))


@triton.jit
def store_part(partial, acc, part, row, col, M, N):
    """Store the sum ``acc`` of a tile over a part of K in ``partial`` [parts, M, N]."""
    at = (part.to(tl.int64) * M + row)[:, None] * N + col[None, :]
    tl.store(partial + at, acc, (row < M)[:, None] & (col < N)[None, :])


@triton.jit
def add_parts(partial, row, col, PARTS, M, N, PARTS_AT_ONCE: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """Return the sum of a tile over all parts in a fixed order, PARTS_AT_ONCE of them a load."""
    share = tl.arange(0, PARTS_AT_ONCE)[:, None, None].to(tl.int64)
    at = row[None, :, None] * N + col[None, None, :]
    inside = (row < M)[None, :, None] & (col < N)[None, None, :]
    total = tl.zeros((PARTS_AT_ONCE, BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, PARTS, PARTS_AT_ONCE):
        part = first + share
        total += tl.load(partial + part * M * N + at, inside & (part < PARTS), 0.0)
    return tl.sum(total, 0)


@kernel(do_not_specialize=["PARTS"])
def _sum_kernel(partial, out, SIZE, PARTS, PARTS_AT_ONCE: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """Store out = the sum of ``partial`` [PARTS, SIZE] over its parts."""
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = add_parts(partial, row, col, PARTS, 1, SIZE, PARTS_AT_ONCE, BLOCK_M, BLOCK_N)
    tl.store(out + col[None, :], total, (col < SIZE)[None, :])


def sum_parts(partial: Tensor, out: Tensor) -> None:
    """Write the sum of ``partial`` [parts, ...] over its parts to ``out``."""
    grid, blocks = part_plan(1, out.numel(), len(partial))
    _sum_kernel[grid](partial, out, out.numel(), **blocks)


def part_plan(m: int, n: int, parts: int) -> tuple[tuple[int], dict]:
    """Return the grid and arguments that add parts of [m, n], 16 loads per thread at a time."""
    shares = min(triton.next_power_of_2(parts), 32)
    block_m = min(triton.next_power_of_2(m), max(2048 // shares // 64, 1))
    block_n = min(max(triton.next_power_of_2(n), 4), 2048 // shares // block_m)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    return grid, {
        "PARTS": parts,
        "PARTS_AT_ONCE": shares,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": 4,
    }


def new_parts(like: Tensor, parts: int, *shape: int) -> Tensor | None:
    """Return an empty float32 tensor [parts, *shape], or None for a single part."""
    return None if parts == 1 else like.new_empty((parts, *shape), dtype=torch.float32)


#: The meaning of the entries of a tile in the tables below.
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "maxnreg")
#: The tiles to choose from, the largest first. With any epilogue they fit the registers, and 99 KB
#: of shared memory. The last is for up to 16 rows, the least that a tile can have. maxnreg is given
#: where ptxas, left to itself, would spill registers to fit one more thread block on a
#: multiprocessor.
_TILES: dict[str, tuple[tuple, ...]] = {
    "16 bits": (
        (128, 128, 64, 8, 3, None),
        (128, 64, 64, 4, 4, 255),
        (64, 64, 64, 4, 4, 128),
        (16, 32, 128, 4, 5, None),
    ),
    # If 16 does not divide the length of rows in memory, each element is loaded on its own.
    "odd": ((128, 64, 32, 8, 3, None), (64, 64, 32, 4, 3, None), (16, 32, 128, 4, 3, None)),
    # Tensor cores do not multiply float32 at full precision. A thread holds whole rows of both
    # operands.
    "float32": (
        (128, 64, 16, 8, 3, None),
        (64, 64, 16, 4, 3, None),
        (32, 32, 16, 2, 3, None),
        (16, 32, 64, 4, 4, None),
    ),
}
#: The tiles for SKIP, of up to 4 rows: wide, since finding the zeros of a takes time in each tile.
_SKIP_TILES: dict[str, tuple] = {
    "16 bits": (16, 256, 64, 4, 3, None),
    "odd": (16, 64, 32, 4, 3, None),
    "float32": (4, 128, 64, 8, 3, None),
}
#: The least number of tiles that keeps a large GPU busy, and the number of its multiprocessors.
_MIN_TILES, _MULTIPROCESSORS = 96, 132
#: The least length of a part of K.
_MIN_PART = 1024


def plan(
    kind: str, a: Tensor, m: int, n: int, k: int, odd: bool, skip: bool = False
) -> tuple[tuple[int], dict]:
    """Return the grid and arguments of a GEMM of [m, k] and [k, n] with the dtype of ``a``.

    They are as tuned for ``kind``. Otherwise the tile is the largest that is not mostly padding and
    of which there are enough to fill the GPU, counting the parts of a long K. If the tiles do not
    fill the GPU, K is split. With ``skip`` it is split further, for more loads in flight.

    Args:
        kind: The key of the tuned settings.
        a: A tensor with the dtype and device of the operands.
        m, n, k: The sizes of the GEMM.
        odd: Whether rows in memory have a length that 16 does not divide.
        skip: Whether b is not loaded where a is 0.
    """
    name = "float32" if a.dtype == torch.float32 else "odd" if odd else "16 bits"
    *large, small, short = _TILES[name]
    tuned = None if odd or skip else settings.settings(kind, a, (m, n, k))
    tile: tuple
    if skip:
        tile = _SKIP_TILES[name]
    elif tuned and not tuned["persistent"]:
        tile = tuple(tuned.get(option) for option in TILE)
    elif m <= 16:
        tile = short
    else:
        tile = next((t for t in large if _fits(t, m, n, k)), small)
    block_m, block_n, block_k, warps, stages, registers = tile
    count = _tile_count(tile, m, n)
    parts = 1
    if skip:
        parts = min(triton.cdiv(2 * _MULTIPROCESSORS, count), k // (_MIN_PART // 4))
    elif count < _MIN_TILES:
        parts = min(triton.cdiv(_MULTIPROCESSORS, count), k // _MIN_PART)
    blocks_k = triton.cdiv(max(k, 1), block_k)
    step = triton.cdiv(blocks_k, max(parts, 1)) * block_k
    parts = triton.cdiv(blocks_k * block_k, step)
    return (count * parts,), {
        "PARTS": parts,
        "PART_LENGTH": step,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": registers,
    }


def _tile_count(tile: tuple, m: int, n: int) -> int:
    """Return the number of tiles of an [m, n] result."""
    return triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1])


def _fits(tile: tuple, m: int, n: int, k: int) -> bool:
    """Return True if a tile is not mostly padding and there are enough, counting parts of K."""
    enough = _tile_count(tile, m, n) * max(k // (2 * _MIN_PART), 1) >= _MIN_TILES
    return enough and tile[0] < 2 * m and tile[1] < 2 * n
