"""The tile sizes, warps and stages of the attention kernels, by what else takes registers."""

import torch
import triton
from torch import Tensor

from llmos_kernels._triton.runtime import launch, settings


def block_dim(d: int) -> int:
    """Return the columns of a block for a head dim of ``d``: tensor cores take at least 16."""
    return max(triton.next_power_of_2(d), 16)


def thread_blocks_per_head(cu: Tensor | None, length: int, block: int) -> int:
    """Return the number of thread blocks for each head, as ``sequence_and_block`` numbers them."""
    if cu is None:
        return triton.cdiv(length, block)
    return length // block + cu.shape[0] - 1


def tile_variant(
    attn_mask: Tensor | None,
    padding: Tensor | None,
    seed: Tensor | None,
    cu: Tensor | None,
    softcap: float,
) -> str:
    """Return the suffix of a kernel's name in the tables of tiles, by what else takes registers."""
    if seed is not None:
        return " dropout"
    if softcap:
        return " softcap"
    return "" if attn_mask is None and padding is None and cu is None else " masked"


#: BLOCK_M, BLOCK_N, warps, stages and maxnreg, for head dims up to 64, 128 and 256: the largest
#: tiles that fit the registers and 99 KB of shared memory. Where these allow it, each warp has 16
#: whole rows of a tile, since with fewer rows several warps do the same work. maxnreg is given
#: where ptxas, left to itself, would spill registers, or where the limit makes room for a second
#: thread block.
_TILES: dict[str, tuple[tuple, ...]] = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
    "forward masked": ((128, 32, 8, 2, 255), (64, 32, 4, 2), (64, 16, 8, 2)),
    "forward dropout": ((64, 32, 4, 2), (128, 32, 8, 2, 255), (64, 16, 8, 2)),
    "decode": ((16, 64, 4, 3), (16, 32, 4, 3), (16, 32, 4, 2)),
    "dquery": ((128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    "dquery masked": ((128, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
    "dquery softcap": ((64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 8, 1)),
    "dkey": ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2, 255)),
    "dkey masked": ((16, 128, 8, 2), (16, 64, 8, 2), (16, 16, 8, 1, 255)),
    "dmask": ((32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    "weights": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    "weights dropout": ((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
}
#: The tiles for ``launch.WGMMA_ARCHS``. There are 227 KB of shared memory, and operands in it take
#: no registers.
_WGMMA_TILES: dict[str, tuple[tuple, ...]] = _TILES | {
    "forward": ((128, 64, 8, 3, 128), (128, 64, 8, 3), (64, 32, 8, 2)),
    "forward masked": ((128, 32, 8, 3, 128), (128, 64, 8, 2), (64, 32, 8, 2, 255)),
    "forward dropout": ((64, 32, 4, 3, 168), (128, 32, 8, 2, 255), (64, 16, 8, 2)),
    "dquery": ((128, 64, 8, 2), (128, 32, 8, 2, 255), (64, 32, 8, 2, 255)),
    "dquery masked": ((128, 32, 8, 2, 255), (128, 32, 8, 2, 255), (32, 32, 8, 1)),
    "dquery softcap": ((128, 32, 8, 2, 255), (128, 32, 8, 2, 255), (32, 32, 8, 1)),
    "dkey": ((64, 128, 8, 2), (32, 128, 8, 2, 255), (32, 32, 8, 2, 255)),
    "dkey masked": ((32, 128, 8, 2, 255), (16, 128, 8, 2, 255), (16, 16, 8, 1, 255)),
    "dmask": ((128, 32, 8, 2, 255), (128, 32, 8, 2, 255), (16, 32, 4, 1)),
}
#: The tiles for float32, which tensor cores do not multiply at full precision: a thread holds whole
#: rows of both operands.
_FLOAT32_TILES: dict[str, tuple[tuple, ...]] = {
    "forward": ((32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    "forward masked": ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "forward softcap": ((32, 32, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "any": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}


def tile_arguments(kernel: str, q: Tensor, dv: int, variant: str = "") -> dict:
    """Return the tile, warps, stages and register limit of ``kernel``.

    They are as tuned, or from the tables above, by device, dtype, head dims and ``tile_variant``.
    A kernel without an entry for dropout or a softcap takes the one for masks.
    """
    widest = max(block_dim(max(q.shape[-1], dv)), 64)
    if found := settings.settings(f"attention {kernel}{variant}", q, (widest,)):
        return dict(found)
    tables = _WGMMA_TILES if launch.has_wgmma(q.device) else _TILES
    if q.dtype == torch.float32:
        tables = _FLOAT32_TILES
    names = (kernel + variant, f"{kernel} masked" if variant else kernel, "any")
    tiles = next(tables[name] for name in names if name in tables)
    m, n, warps, stages, *registers = tiles[widest.bit_length() - 7]
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": registers[0] if registers else None,
    }
