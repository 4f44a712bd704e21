"""What the attention kernels share: positions, tiles of rows, logits, and who sees whom.

A program owns a block of rows of one (batch, head), found from one program index so that no count
meets the 65,535 limit of the other grid axes. Positions inside a sequence are int32, everything
that becomes an offset is int64.
"""

import torch
import triton
import triton.language as tl

from llmos_kernels._triton.rows import dropout_factors
from llmos_kernels._triton.runtime import launch, settings

LOG2E = tl.constexpr(1.4426950408889634)
#: The least normal float32: -inf times a scale of 0 would be NaN.
LEAST_SCALE = tl.constexpr(2.0**-126)
TOP_LEFT = tl.constexpr(1)
SCAN: tl.constexpr = tl.constexpr(1024)


@triton.jit
def sequence_span(cu, sequence, SEQUENCES, length):
    """Where a packed sequence starts, and its length; 0 and ``length`` where nothing is packed.

    The first starts at 0 and the last ends at the total, so that every row has an owner.
    """
    start = 0 * length
    stop = length
    if cu is not None:
        start = tl.minimum(tl.maximum(tl.load(cu + sequence), 0), length)
        stop = tl.minimum(tl.maximum(tl.load(cu + sequence + 1), 0), length)
        start = tl.where(sequence == 0, 0, start)
        stop = tl.where(sequence == SEQUENCES - 1, length, stop)
    return start, tl.maximum(stop - start, 0)


@triton.jit
def locate(cu, SEQUENCES, length, slot, BLOCK: tl.constexpr):
    """The sequence, and the block of it, that the program at ``slot`` owns.

    Packed, sequence s owns the slots from ``cu[s] // BLOCK + s`` on: at least as many as it has
    blocks. What is left over lies past the end of its sequence.
    """
    sequence = 0 * slot
    block = slot
    if cu is not None:
        lane = tl.arange(0, 128)
        for first in range(0, SEQUENCES, 128):
            s = first + lane
            start = tl.minimum(tl.maximum(tl.load(cu + s, s < SEQUENCES, 0), 0), length)
            owned = (start // BLOCK + s <= slot) & (s > 0) & (s < SEQUENCES)
            sequence += tl.sum(owned.to(tl.int32))
        start, _ = sequence_span(cu, sequence, SEQUENCES, length)
        block = slot - (start // BLOCK + sequence)
    return sequence, tl.maximum(block, 0)


@triton.jit
def query_block(cu_q, cu_k, q_len, k_len, HEADS, BLOCKS, SEQUENCES,
                CAUSAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The queries that a program owns: b, h, the first one's position in their sequence, where that and
    its keys start, how long both are, and ``offset``: query i may see keys up to i + offset."""
    slot = tl.program_id(0) % BLOCKS
    if CAUSAL:
        # The blocks with the most keys first, that the last to finish are short.
        slot = BLOCKS - 1 - slot
    bh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    sequence, block = locate(cu_q, SEQUENCES, q_len, slot, BLOCK)
    q_start, q_count = sequence_span(cu_q, sequence, SEQUENCES, q_len)
    k_start, k_count = sequence_span(cu_k, sequence, SEQUENCES, k_len)
    offset = 0 * k_count if CAUSAL == TOP_LEFT else k_count - q_count
    return bh // HEADS, bh % HEADS, block * BLOCK, q_start, q_count, k_start, k_count, offset


@triton.jit
def keeps(padding, at, inside):
    """Which of the keys ``at`` are ``inside``, and not ignored by a padding mask, which comes as int8, or let
    through by a bool mask that is the same for all queries, which comes as uint8."""
    if padding.dtype.element_ty == tl.uint8:
        kept = tl.load(padding + at, inside, 0) != 0
    else:
        kept = tl.load(padding + at, inside, 1) == 0
    return kept


@triton.jit
def kept_span(padding, stride, begin, end):
    """Of the keys [begin, end): the first that padding keeps, one past the last, and how many."""
    lane = tl.arange(0, SCAN)
    first = tl.zeros((SCAN,), tl.int32) + end
    stop = tl.zeros((SCAN,), tl.int32)
    count = tl.zeros((SCAN,), tl.int32)
    for start in range(begin, end, SCAN):
        col = start + lane
        kept = keeps(padding, col.to(tl.int64) * stride, col < end)
        first = tl.where(kept, tl.minimum(first, col), first)
        stop = tl.where(kept, col + 1, stop)
        count += kept.to(tl.int32)
    return tl.min(first), tl.max(stop), tl.sum(count)


@triton.jit
def key_span(padding, padding_col, begin, end, least, most,
             CAUSAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """What queries that see keys up to ``least`` ... ``most`` have to walk over, of [begin, end).

    Returns k_first, k_stop: keys outside are ignored; and four tile bounds. In [first, whole) every
    query sees every key. In [whole, holes) only k_first, k_stop and the diagonal hide any. In
    [holes, stop) there are ignored keys between others: the padding mask itself is needed.
    """
    k_first = begin
    k_stop = end
    if padding is not None:
        k_first, k_stop, kept = kept_span(padding, padding_col, begin, end)
    first = k_first // BLOCK * BLOCK
    whole = k_stop // BLOCK * BLOCK
    stop = k_stop
    if CAUSAL:
        stop = tl.minimum(stop, most + 1)
        whole = tl.minimum(whole, tl.maximum(least + 1, 0) // BLOCK * BLOCK)
    if padding is not None:
        whole = tl.where(first == k_first, whole, first)
    whole = tl.maximum(tl.minimum(whole, stop), first)
    holes = stop
    if padding is not None:
        whole = tl.where(kept < k_stop - k_first, first, whole)
        holes = tl.where(kept < k_stop - k_first, first, stop)
    return k_first, k_stop, first, whole, holes, stop


@triton.jit
def readable_keys(padding, padding_col, col, k_count):
    """Which of the keys ``col`` exist and are not ignored: what is ignored may hold NaN."""
    inside = col < k_count
    if padding is not None:
        inside &= keeps(padding, col.to(tl.int64) * padding_col, inside)
    return inside


@triton.jit
def keys_inside(padding, padding_col, col, k_first, k_stop, EDGE: tl.constexpr):
    """Which of the keys ``col`` any query may see: in the first part of a ``key_span`` (0) all, None;
    in the next those from k_first to k_stop; in the last (2) those that padding keeps."""
    inside = None
    if EDGE:
        inside = readable_keys(padding if EDGE == 2 else None, padding_col, col, k_stop)
        inside &= col >= k_first
    return inside


@triton.jit
def load_rows(x, row, stride, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``x[row]`` of D columns, with zeros where not ``inside`` (None: all are) and past D."""
    d = tl.arange(0, BLOCK)[None, :]
    at = x + row.to(tl.int64)[:, None] * stride + d
    if D == BLOCK and inside is None:
        tile = tl.load(at)
    elif D == BLOCK:
        tile = tl.load(at, inside[:, None], 0.0)
    elif inside is None:
        tile = tl.load(at, d < D, 0.0)
    else:
        tile = tl.load(at, inside[:, None] & (d < D), 0.0)
    return tile


@triton.jit
def store_rows(x, row, stride, inside, v, D: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)[None, :]
    at = x + row.to(tl.int64)[:, None] * stride + d
    tl.store(at, v.to(x.dtype.element_ty), inside[:, None] & (d < D))


@triton.jit
def attends(mask, inside):
    """What a tile of a bool mask lets through."""
    return tl.load(mask, inside, 0) != 0


@triton.jit
def logits(a, b, mask, attended, inside, col, last, scale, BIAS: tl.constexpr):
    """a b^T, plus the float ``mask``; -inf where not ``attended``, not ``inside`` or past ``last``.

    Times ``scale`` only where a mask is added. What is None does not limit.
    """
    x = tl.dot(a, tl.trans(b), input_precision="ieee")
    if BIAS:
        x *= scale
        if inside is None:
            x += tl.load(mask).to(tl.float32)
        else:
            x += tl.load(mask, inside, 0.0).to(tl.float32)
    if attended is not None:
        x = tl.where(attended, x, float("-inf"))
    if inside is not None:
        x = tl.where(inside, x, float("-inf"))
    if last is not None:
        x = tl.where(col <= last, x, float("-inf"))
    return x


@triton.jit
def exponential(x, m, scale, BIAS: tl.constexpr):
    """exp(logits - m) of what ``logits`` returned; m, the largest, is in natural units.

    In base 2 only after the difference: a mask of the least float must not become -inf before, and
    where x is the largest the result is 1, as in the reference that m may come from.
    """
    if not BIAS:
        x *= tl.maximum(scale, LEAST_SCALE)
    return tl.exp2((x - m) * LOG2E)


@triton.jit
def tile_weights(query, key, value, dout, m, inverse, mask, attended, inside, col, last, seed, drawn,
                 start, scale, threshold, factor,
                 BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """A tile of weights and their gradient, [queries, keys]."""
    x = logits(query, key, mask, attended, inside, col, last, scale, BIAS)
    p = exponential(x, m, scale, BIAS) * inverse
    dp = tl.dot(dout, tl.trans(value), input_precision="ieee")
    if seed is not None:
        dp *= dropout_factors(seed, drawn, start, threshold, factor, BLOCK_M, BLOCK_N)
    return p, dp


def with_unit_columns(t: torch.Tensor) -> torch.Tensor:
    """``t``, copied only if its last dimension is not one run of memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def stride_arguments(**tensors: torch.Tensor) -> dict:
    """``<name>_batch``, ``_head`` and ``_row`` of each."""
    return {
        f"{name}_{what}": step
        for name, t in tensors.items()
        for what, step in zip(("batch", "head", "row"), t.stride(), strict=False)
    }


def mask_arguments(attn_mask, padding) -> dict:
    """The kernels' arguments for both masks. A stride is 0 along what is broadcast; for rows it is
    None, so that a mask of keys alone is read as one row. A bool one, where it is the same for all heads
    and alone, is a padding mask: whole tiles are passed over, and the others loaded ahead."""
    arguments = {"mask": None, "mask_batch": 0, "mask_head": 0, "mask_row": None, "mask_col": 0}
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    if attn_mask is not None:
        batch, head, row, col = (
            0 if n == 1 else step
            for n, step in zip(attn_mask.shape, attn_mask.stride(), strict=True)
        )
        if is_bool and padding is None and head == row == 0:
            kept = attn_mask.view(torch.uint8)
            kept = {"padding": kept, "padding_batch": batch, "padding_col": col}
            return arguments | kept | {"BIAS": False}
        arguments = {
            "mask": attn_mask.view(torch.int8) if is_bool else attn_mask,
            "mask_batch": batch,
            "mask_head": head,
            "mask_row": row or None,
            "mask_col": col,
        }
    batch, col = (0, 0) if padding is None else padding.stride()
    padding = None if padding is None else padding.view(torch.int8)
    ignored = {"padding": padding, "padding_batch": batch, "padding_col": col}
    return arguments | ignored | {"BIAS": attn_mask is not None and not is_bool}


def packed_arguments(cu_q, cu_k) -> dict:
    return {"cu_q": cu_q, "cu_k": cu_k, "SEQUENCES": 0 if cu_q is None else cu_q.shape[0] - 1}


def block_dim(d: int) -> int:
    """Columns of a tile for a head dim of ``d``: tensor cores take at least 16."""
    return max(triton.next_power_of_2(d), 16)


def slots(cu, length: int, block: int) -> int:
    """Programs for each head: see ``locate``."""
    if cu is None:
        return triton.cdiv(length, block)
    return length // block + cu.shape[0] - 1


def load_of(attn_mask, padding, seed, cu) -> str:
    """What takes registers beside the products: it chooses a tile."""
    if seed is not None:
        return " dropout"
    return "" if attn_mask is None and padding is None and cu is None else " masked"


#: BLOCK_M, BLOCK_N, warps, stages and registers for head dims to 64, to 128 and to 256: the largest that keep
#: to registers and to 99 KB of shared memory. Where that allows it each warp has 16 whole rows of a
#: tile of logits: with less rows several do the same work. Registers are stated where ptxas would rather spill some, or where
#: a second program then has room.
_TILES: dict[str, tuple[tuple, ...]] = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
    "forward masked": ((128, 32, 8, 2, 255), (64, 32, 4, 2), (64, 16, 8, 2)),
    "forward dropout": ((64, 32, 4, 2), (128, 32, 8, 2, 255), (64, 16, 8, 2)),
    "decode": ((16, 64, 4, 3), (16, 32, 4, 3), (16, 32, 4, 2)),
    "dquery": ((128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    "dquery masked": ((128, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
    "dkey": ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2, 255)),
    "dkey masked": ((16, 128, 8, 2), (16, 64, 8, 2), (16, 16, 8, 1, 255)),
    "dmask": ((32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    "weights": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
}
#: Where tensor cores read operands from shared memory, of which there are 227 KB: registers are left.
_ENGINE_TILES: dict[str, tuple[tuple, ...]] = _TILES | {
    "forward": ((128, 64, 8, 3, 128), (128, 64, 8, 3), (64, 32, 8, 2)),
    "forward masked": ((128, 32, 8, 3, 128), (128, 64, 8, 2), (64, 32, 8, 2, 255)),
    "forward dropout": ((64, 32, 4, 3, 168), (128, 32, 8, 2, 255), (64, 16, 8, 2)),
    "dquery": ((128, 64, 8, 2), (128, 32, 8, 2, 255), (64, 32, 8, 2, 255)),
    "dquery masked": ((128, 32, 8, 2, 255), (128, 32, 8, 2, 255), (32, 32, 8, 1)),
    "dkey": ((64, 128, 8, 2), (32, 128, 8, 2, 255), (32, 32, 8, 2, 255)),
    "dkey masked": ((32, 128, 8, 2, 255), (16, 128, 8, 2, 255), (16, 16, 8, 1, 255)),
    "dmask": ((128, 32, 8, 2, 255), (128, 32, 8, 2, 255), (16, 32, 4, 1)),
}
#: float32 has no tensor cores at full precision: a thread holds whole rows of both operands.
_FLOAT32_TILES: dict[str, tuple[tuple, ...]] = {
    "forward": ((32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    "forward masked": ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "any": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}


def tile(kernel: str, q: torch.Tensor, dv: int, load: str = "") -> dict:
    """Tile and warps of a kernel, from the head dims, the dtype and what else it has to do (``load_of``);
    as settings, or by these tables, where dropout has the tile of masks unless there is one of its own."""
    widest = max(block_dim(max(q.shape[-1], dv)), 64)
    if found := settings.settings(f"attention {kernel}{load}", q, (widest,)):
        return dict(found)
    tables = _ENGINE_TILES if launch.has_engine(q.device) else _TILES
    if q.dtype == torch.float32:
        tables = _FLOAT32_TILES
    names = (kernel + load, f"{kernel} masked" if load else kernel, "any")
    tiles = next(tables[name] for name in names if name in tables)
    m, n, warps, stages, *registers = tiles[widest.bit_length() - 7]
    return {
        "BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages,
        "maxnreg": registers[0] if registers else None,
    }  # fmt: skip
