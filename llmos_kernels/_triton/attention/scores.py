"""Shared parts of the attention kernels: positions, loads, logits, masks and launch arguments.

A thread block computes a block of rows of one (batch, head). The grid has a single axis, since the
other axes are limited to 65,535 thread blocks. Positions inside a sequence are int32, and
everything that becomes an offset is int64.

A tile is a block of the matrix of scores, [queries, keys]. Three arguments limit the keys that a
query sees; None stands for no limit:

    inside      for each key of the tile: it exists, and key padding does not hide it. Keys and
                values are read only there
    attended    for each query and key of the tile: the bool attn_mask is True
    last        for each query: the position of the last key that the causal mask lets it see
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.rows import dropout_factors

LOG2E = tl.constexpr(1.4426950408889634)
#: The least normal float32. Scales are raised to it, since -inf times 0 would be NaN.
LEAST_SCALE = tl.constexpr(2.0**-126)
TOP_LEFT = tl.constexpr(1)
#: The number of keys that ``valid_span`` reads at a time.
SCAN: tl.constexpr = tl.constexpr(1024)


@triton.jit
def sequence_span(cu, sequence, SEQUENCES, length):
    """Return where a varlen sequence starts, and its length; 0 and ``length`` without varlen.

    The first sequence starts at 0 and the last ends at ``length`` whatever ``cu`` says, so that
    every row belongs to a sequence.
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
def sequence_and_block(cu, SEQUENCES, length, slot, BLOCK: tl.constexpr):
    """Return the sequence and the block of its rows that the thread block number ``slot`` computes.

    With varlen, sequence s has the slots from ``cu[s] // BLOCK + s`` on: at least as many as it has
    blocks of rows. The blocks of surplus slots lie past the end of the sequence.
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
    """Return the block of queries of this thread block, and the span of its sequence.

    The results are the batch, the head, the position of the first query in its sequence, start and
    length of the sequence's queries, start and length of its keys, and the causal ``offset``: query
    i sees keys up to i + offset.
    """
    slot = tl.program_id(0) % BLOCKS
    if CAUSAL:
        # Blocks with the most keys start first, so that those that finish last are short.
        slot = BLOCKS - 1 - slot
    bh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    sequence, block = sequence_and_block(cu_q, SEQUENCES, q_len, slot, BLOCK)
    q_start, q_count = sequence_span(cu_q, sequence, SEQUENCES, q_len)
    k_start, k_count = sequence_span(cu_k, sequence, SEQUENCES, k_len)
    offset = 0 * k_count if CAUSAL == TOP_LEFT else k_count - q_count
    return bh // HEADS, bh % HEADS, block * BLOCK, q_start, q_count, k_start, k_count, offset


@triton.jit
def valid_keys(padding, at, inside):
    """Return which of the keys ``at`` are ``inside`` and not masked by ``padding``.

    An int8 ``padding`` is a key padding mask, which is nonzero for keys to ignore. A uint8 one is a
    bool attn_mask that is the same for all queries, and nonzero for keys that are visible.
    """
    if padding.dtype.element_ty == tl.uint8:
        valid = tl.load(padding + at, inside, 0) != 0
    else:
        valid = tl.load(padding + at, inside, 1) == 0
    return valid


@triton.jit
def valid_span(padding, stride, begin, end):
    """Return, of the valid keys in [begin, end), the first, one past the last, and the number."""
    lane = tl.arange(0, SCAN)
    first = tl.zeros((SCAN,), tl.int32) + end
    stop = tl.zeros((SCAN,), tl.int32)
    count = tl.zeros((SCAN,), tl.int32)
    for start in range(begin, end, SCAN):
        col = start + lane
        valid = valid_keys(padding, col.to(tl.int64) * stride, col < end)
        first = tl.where(valid, tl.minimum(first, col), first)
        stop = tl.where(valid, col + 1, stop)
        count += valid.to(tl.int32)
    return tl.min(first), tl.max(stop), tl.sum(count)


@triton.jit
def key_span(padding, padding_col, begin, end, low_limit, high_limit,
             CAUSAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Return the ranges of keys in [begin, end) that a block of queries has to visit.

    With CAUSAL the first query of the block sees keys up to ``low_limit``, the last one up to
    ``high_limit``. The results are k_first and k_stop, which enclose the valid keys, and the bounds
    of three ranges, each visited in blocks of BLOCK keys:

        0: [first, bounded)    every query sees every key
        1: [bounded, padded)   only k_first, k_stop and the causal diagonal hide keys
        2: [padded, stop)      invalid keys lie between valid ones, so that padding must be read
    """
    k_first = begin
    k_stop = end
    if padding is not None:
        k_first, k_stop, count = valid_span(padding, padding_col, begin, end)
    first = k_first // BLOCK * BLOCK
    bounded = k_stop // BLOCK * BLOCK
    stop = k_stop
    if CAUSAL:
        stop = tl.minimum(stop, high_limit + 1)
        bounded = tl.minimum(bounded, tl.maximum(low_limit + 1, 0) // BLOCK * BLOCK)
    if padding is not None:
        bounded = tl.where(first == k_first, bounded, first)
    bounded = tl.maximum(tl.minimum(bounded, stop), first)
    padded = stop
    if padding is not None:
        bounded = tl.where(count < k_stop - k_first, first, bounded)
        padded = tl.where(count < k_stop - k_first, first, stop)
    return k_first, k_stop, first, bounded, padded, stop


@triton.jit
def readable_keys(padding, padding_col, col, k_count):
    """Return which of the keys ``col`` exist and are valid: invalid ones may hold NaN."""
    inside = col < k_count
    if padding is not None:
        inside &= valid_keys(padding, col.to(tl.int64) * padding_col, inside)
    return inside


@triton.jit
def keys_inside(padding, padding_col, col, k_first, k_stop, KEY_RANGE: tl.constexpr):
    """Return which of the keys ``col`` are valid in the part KEY_RANGE, 0 to 2, of a ``key_span``.

    The result is None in range 0, where all are. In range 1 the keys from k_first to k_stop are
    valid; in range 2 padding decides.
    """
    inside = None
    if KEY_RANGE:
        inside = readable_keys(padding if KEY_RANGE == 2 else None, padding_col, col, k_stop)
        inside &= col >= k_first
    return inside


@triton.jit
def load_rows(x, row, stride, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """Return rows ``x[row]`` of D columns, with zeros where not ``inside`` and past D."""
    d = tl.arange(0, BLOCK)[None, :]
    at = x + row.to(tl.int64)[:, None] * stride + d
    if D == BLOCK and inside is None:
        loaded = tl.load(at)
    elif D == BLOCK:
        loaded = tl.load(at, inside[:, None], 0.0)
    elif inside is None:
        loaded = tl.load(at, d < D, 0.0)
    else:
        loaded = tl.load(at, inside[:, None] & (d < D), 0.0)
    return loaded


@triton.jit
def store_rows(x, row, stride, inside, v, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store v in the rows ``x[row]`` of D columns, where ``inside``."""
    d = tl.arange(0, BLOCK)[None, :]
    at = x + row.to(tl.int64)[:, None] * stride + d
    tl.store(at, v.to(x.dtype.element_ty), inside[:, None] & (d < D))


@triton.jit
def load_bool_mask(mask, inside):
    """Return where a tile of a bool mask is True."""
    return tl.load(mask, inside, 0) != 0


@triton.jit
def tanh(x):
    """Return tanh(x); its error is relative to it also next to 0."""
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    t = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * p, tl.where(x < 0, -t, t))


@triton.jit
def scores(a, b, scale, softcap):
    """Return a tile a b^T, with ``softcap`` multiplied by ``scale`` and capped."""
    x = tl.dot(a, tl.trans(b), input_precision="ieee")
    if softcap is not None:
        x = softcap * tanh(x * (scale / softcap))
    return x


@triton.jit
def uncapped(ds, x, softcap):
    """Return the gradient of scaled scores from ``ds``, that of the ``scores`` x."""
    if softcap is not None:
        t = x / softcap
        ds *= 1 - t * t
    return ds


@triton.jit
def logits(x, mask, attended, inside, col, last, scale, softcap, BIAS: tl.constexpr):
    """Return ``scores`` x, or -inf where not ``attended``, not ``inside`` or past ``last``.

    With BIAS they are multiplied by ``scale`` and the float ``mask`` is added. Otherwise
    ``exponential`` multiplies by ``scale``. With ``softcap`` they are scaled already.
    """
    if BIAS:
        if softcap is None:
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
def exponential(x, m, scale, SCALED: tl.constexpr):
    """Return exp(x * scale - m) of ``logits`` x, which are already scaled with SCALED.

    m is the maximum in natural units. The change to base 2 follows the subtraction: before it, it
    would turn a mask value of the lowest float into -inf. Where the logit is the maximum the result
    is 1 exactly, also if m comes from the reference.
    """
    if not SCALED:
        x *= tl.maximum(scale, LEAST_SCALE)
    return tl.exp2((x - m) * LOG2E)


@triton.jit
def tile_weights(query, key, value, dout, m, inverse, mask, attended, inside, col, last, seed,
                 dropout_row, start, scale, softcap, threshold, factor,
                 BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Return a tile [queries, keys] of the attention weights p, their gradient dp, and ``scores``.

    ``dropout_row`` are the rows of the dropout mask.
    """
    x = scores(query, key, scale, softcap)
    logit = logits(x, mask, attended, inside, col, last, scale, softcap, BIAS)
    p = exponential(logit, m, scale, BIAS or softcap is not None) * inverse
    dp = tl.dot(dout, tl.trans(value), input_precision="ieee")
    if seed is not None:
        dp *= dropout_factors(seed, dropout_row, start, threshold, factor, BLOCK_M, BLOCK_N)
    return p, dp, x


def with_unit_columns(t: Tensor) -> Tensor:
    """Return ``t``, or a contiguous copy if its last dimension has a stride other than 1."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def stride_arguments(**tensors: Tensor) -> dict:
    """Return the strides of each tensor as ``<name>_batch``, ``<name>_head`` and ``<name>_row``."""
    return {
        f"{name}_{what}": step
        for name, t in tensors.items()
        for what, step in zip(("batch", "head", "row"), t.stride(), strict=False)
    }


def mask_arguments(attn_mask: Tensor | None, padding: Tensor | None) -> dict:
    """Return the kernel arguments of the attention mask and of the key padding mask.

    Strides are 0 along broadcast dimensions, but None for ``mask_row``, so that a mask that is the
    same for all queries is read as one row. If such a mask is bool and the same for all heads, and
    there is no key padding mask, it is passed as one: kernels then skip the tiles before the first
    and after the last visible key, and prefetch the keys of the others.
    """
    arguments: dict[str, Any] = {
        "mask": None,
        "mask_batch": 0,
        "mask_head": 0,
        "mask_row": None,
        "mask_col": 0,
    }
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    if attn_mask is not None:
        batch, head, row, col = (
            0 if n == 1 else step
            for n, step in zip(attn_mask.shape, attn_mask.stride(), strict=True)
        )
        if is_bool and padding is None and head == row == 0:
            visible = attn_mask.view(torch.uint8)
            as_padding = {"padding": visible, "padding_batch": batch, "padding_col": col}
            return arguments | as_padding | {"BIAS": False}
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


def varlen_arguments(cu_q: Tensor | None, cu_k: Tensor | None) -> dict:
    """Return the kernel arguments of varlen sequences, None and 0 without them."""
    return {"cu_q": cu_q, "cu_k": cu_k, "SEQUENCES": 0 if cu_q is None else cu_q.shape[0] - 1}
