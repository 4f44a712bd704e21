"""What the matrix products share: the tile of a program, its sum, parts of the sum, the block rule.

A product is [M, N] = a [M, K] b [K, N], with any strides: a transposed operand has its strides
exchanged. A program owns one tile and a part of K. Where there are few tiles K is split, and the
parts, float32, are added in order by a second kernel. Sizes are int32, offsets int64.
"""

import torch
import triton
import triton.language as tl

from llmos_kernels._triton.runtime import settings
from llmos_kernels._triton.runtime.launch import kernel

#: Rows of tiles that are walked together, so that what runs at one time shares both operands in L2.
_GROUP: tl.constexpr = tl.constexpr(8)


@triton.jit
def place(M, N, PARTS, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The part of K, the tile's first row and its first column that the program owns."""
    row, col = place_tile(tl.program_id(0) // PARTS, M, N, BLOCK_M, BLOCK_N)
    return tl.program_id(0) % PARTS, row, col


@triton.jit
def place_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row and the first column of a tile."""
    rows = tl.cdiv(M, BLOCK_M)
    cols = tl.cdiv(N, BLOCK_N)
    group = tile // (_GROUP * cols)
    height = tl.minimum(rows - group * _GROUP, _GROUP)
    tile %= _GROUP * cols
    row = (group * _GROUP + tile % height).to(tl.int64) * BLOCK_M
    return row, (tile // height).to(tl.int64) * BLOCK_N


@triton.jit
def part_span(part, K, STEP):
    """Where a part starts, how long it is, and how much of K follows that start.

    What lies outside K is masked by the last: unlike the length it is known to be aligned.
    """
    first = part.to(tl.int64) * STEP
    rest = (K - first).to(tl.int32)
    return first, tl.minimum(rest, STEP), rest


@triton.jit
def multiply(a, b, row, col, part, M, N, K, STEP, a_row, a_inner, b_inner, b_col,
             SKIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """The float32 sum of a[row, k] b[k, col] over a part of K. SKIP: b is not loaded where a is 0."""
    k = tl.arange(0, BLOCK_K)
    first, length, rest = part_span(part, K, STEP)
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
    """The left and the right columns of a tile: what is done with one at a time needs less registers."""
    return tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))


@triton.jit
def store_part(partial, acc, part, row, col, M, N):
    at = (part.to(tl.int64) * M + row)[:, None] * N + col[None, :]
    tl.store(partial + at, acc, (row < M)[:, None] & (col < N)[None, :])


@triton.jit
def add_parts(partial, row, col, PARTS, M, N,
              SHARES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The sum of a tile over its parts, SHARES of them loaded together, in one order."""
    share = tl.arange(0, SHARES)[:, None, None].to(tl.int64)
    at = row[None, :, None] * N + col[None, None, :]
    inside = (row < M)[None, :, None] & (col < N)[None, None, :]
    total = tl.zeros((SHARES, BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, PARTS, SHARES):
        part = first + share
        total += tl.load(partial + part * M * N + at, inside & (part < PARTS), 0.0)
    return tl.sum(total, 0)


@kernel(do_not_specialize=["PARTS"])
def _sum_kernel(partial, out, SIZE, PARTS, SHARES: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = add_parts(partial, row, col, PARTS, 1, SIZE, SHARES, BLOCK_M, BLOCK_N)
    tl.store(out + col[None, :], total, (col < SIZE)[None, :])


def sum_parts(partial: torch.Tensor, out: torch.Tensor) -> None:
    """out = the sum of ``partial`` [parts, ...] over its parts."""
    grid, blocks = part_plan(1, out.numel(), len(partial))
    _sum_kernel[grid](partial, out, out.numel(), **blocks)


def part_plan(m: int, n: int, parts: int) -> tuple[tuple[int], dict]:
    """Programs that add parts of [m, n], and their arguments: 16 loads a thread at one time."""
    shares = min(triton.next_power_of_2(parts), 32)
    block_m = min(triton.next_power_of_2(m), max(2048 // shares // 64, 1))
    block_n = min(max(triton.next_power_of_2(n), 4), 2048 // shares // block_m)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    return grid, {
        "PARTS": parts, "SHARES": shares, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4,
    }  # fmt: skip


def new_parts(like: torch.Tensor, parts: int, *shape: int) -> torch.Tensor | None:
    """Room for the float32 parts of a sum; None where it is one."""
    return None if parts == 1 else like.new_empty((parts, *shape), dtype=torch.float32)


#: What a tile is given as.
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "maxnreg")
#: Of these the largest first: what keeps to registers, with any epilogue, and to 99 KB of shared
#: memory. The last is for up to 16 rows, as few as a tile can have. Registers are stated where ptxas
#: would rather spill some than have one program less.
_TILES = {
    "16 bits": (
        (128, 128, 64, 8, 3, None),
        (128, 64, 64, 4, 4, 255),
        (64, 64, 64, 4, 4, 128),
        (16, 32, 128, 4, 5, None),
    ),
    # Rows in memory of a length that is no multiple of 16: each element has a pointer of its own.
    "odd": ((128, 64, 32, 8, 3, None), (64, 64, 32, 4, 3, None), (16, 32, 128, 4, 3, None)),
    # No tensor cores at full precision: a thread holds whole rows of both operands.
    "float32": (
        (128, 64, 16, 8, 3, None),
        (64, 64, 16, 4, 3, None),
        (32, 32, 16, 2, 3, None),
        (16, 32, 64, 4, 4, None),
    ),
}
#: For up to 4 rows that skip columns of b: wide, since it takes work to find these.
_SKIP_TILES = {
    "16 bits": (16, 256, 64, 4, 3, None),
    "odd": (16, 64, 32, 4, 3, None),
    "float32": (4, 128, 64, 8, 3, None),
}
#: Tiles that keep a large GPU busy, its multiprocessors, and the least length of a part of K.
_BUSY, _FULL, _PART = 96, 132, 1024


def plan(
    kind: str, a: torch.Tensor, m: int, n: int, k: int, odd: bool, skip: bool = False
) -> tuple[tuple[int], dict]:
    """The programs of [m, k] times [k, n] with elements as in ``a``, and their arguments.

    As tuned for ``kind``, else: of the tiles that are not mostly padding the largest of which there are enough, when a long sum
    is split. What still leaves a GPU idle is split more finely; so is what skips, to have more
    loads under way.
    """
    name = "float32" if a.dtype == torch.float32 else "odd" if odd else "16 bits"
    *tall, small, few = _TILES[name]
    found = None if odd or skip else settings.settings(kind, a, (m, n, k))
    if skip:
        tile = _SKIP_TILES[name]
    elif found and not found["persistent"]:
        tile = tuple(found.get(option) for option in TILE)
    elif m <= 16:
        tile = few
    else:
        tile = next((t for t in tall if _fits(t, m, n, k)), small)
    block_m, block_n, block_k, warps, stages, registers = tile
    count = _count(tile, m, n)
    parts = 1
    if skip:
        parts = min(triton.cdiv(2 * _FULL, count), k // (_PART // 4))
    elif count < _BUSY:
        parts = min(triton.cdiv(_FULL, count), k // _PART)
    blocks_k = triton.cdiv(max(k, 1), block_k)
    step = triton.cdiv(blocks_k, max(parts, 1)) * block_k
    parts = triton.cdiv(blocks_k * block_k, step)
    return (count * parts,), {
        "PARTS": parts, "STEP": step, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "num_warps": warps, "num_stages": stages, "maxnreg": registers,
    }  # fmt: skip


def _count(tile: tuple, m: int, n: int) -> int:
    return triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1])


def _fits(tile: tuple, m: int, n: int, k: int) -> bool:
    """Whether a tile is not mostly padding, and there are enough: a long sum counts for its parts."""
    enough = _count(tile, m, n) * max(k // (2 * _PART), 1) >= _BUSY
    return enough and tile[0] < 2 * m and tile[1] < 2 * n
