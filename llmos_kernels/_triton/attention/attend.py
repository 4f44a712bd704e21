"""The loop over the keys of a block of queries, which all Triton forward kernels of attention use.

It is an online softmax (Dao 2023); the formulas are in ``ops/attention.py``.
"""

import triton
import triton.language as tl

from llmos_kernels._triton.attention.scores import (
    LEAST_SCALE,
    LOG2E,
    exponential,
    key_span,
    keys_inside,
    load_bool_mask,
    load_rows,
    logits,
    scores,
)
from llmos_kernels._triton.rows import dropout_factors


@triton.jit
def _step(m, total, acc, query, k, v, mask, attended, padding, padding_col, seed, dropout_row,
          start, last, k_first, k_stop, k_row, v_row, mask_col, scale, softcap, threshold, factor,
          KEY_RANGE: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr,
          DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
          BLOCK_DV: tl.constexpr):  # fmt: skip
    """Return m, total and acc after one more block of keys.

    m is the largest logit so far, total the sum of exponentials, acc the sum of weighted values.
    """
    col = start + tl.arange(0, BLOCK_N)
    inside = keys_inside(padding, padding_col, col, k_first, k_stop, KEY_RANGE)
    key = load_rows(k, col, k_row, inside, D, BLOCK_D)
    x = logits(
        scores(query, key, scale, softcap),
        mask + col.to(tl.int64)[None, :] * mask_col if BIAS else None,
        attended,
        inside[None, :] if KEY_RANGE else None,
        col[None, :],
        last if KEY_RANGE and CAUSAL else None,
        scale,
        softcap,
        BIAS,
    )
    SCALED: tl.constexpr = BIAS or softcap is not None
    largest = tl.max(x, 1)
    if not SCALED:
        largest *= tl.maximum(scale, LEAST_SCALE)
    largest = tl.maximum(m, largest)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    if SCALED or query.dtype == tl.float32:
        p = exponential(x, finite[:, None], scale, SCALED)
    else:
        # One fused multiply-add for each logit. total sums the same p, so that the rounding of m
        # cancels. The p of the backward pass differ from these by less than their rounding.
        p = tl.exp2(x * (tl.maximum(scale, LEAST_SCALE) * LOG2E) - (finite * LOG2E)[:, None])
    rescale = tl.exp2((m - finite) * LOG2E)
    total = total * rescale + tl.sum(p, 1)
    if seed is not None:
        p *= dropout_factors(seed, dropout_row, start, threshold, factor, BLOCK_M, BLOCK_N)
    value = load_rows(v, col, v_row, inside, DV, BLOCK_DV)
    acc = tl.dot(p.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
    return largest, total, acc


@triton.jit
def add_sink(m, total, sink):
    """Return m and total with a sink, a logit without a value, and the factor of acc."""
    largest = tl.maximum(tl.where(total == 0, float("-inf"), m), sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    rescale = tl.where(total == 0, 0.0, tl.exp2((m - largest) * LOG2E))
    return largest, total * rescale + tl.exp2((sink - largest) * LOG2E), rescale


@triton.jit
def attend(query, k, v, mask, padding, padding_col, seed, dropout_row, last, begin, end, low_limit,
           high_limit, k_row, v_row, mask_col, scale, softcap, threshold, factor,
           CAUSAL: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_DV: tl.constexpr):  # fmt: skip
    """Return m, total and acc of a block of queries over the keys [begin, end)."""
    k_first, k_stop, first, bounded, padded, stop = key_span(
        padding, padding_col, begin, end, low_limit, high_limit, CAUSAL, BLOCK_N
    )
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for key_range in tl.static_range(2 if padding is None else 3):
        low = first if key_range == 0 else (bounded if key_range == 1 else padded)
        high = bounded if key_range == 0 else (padded if key_range == 1 else stop)
        for visited in range(0, high - low, BLOCK_N):
            start = low + visited
            if mask is not None and not BIAS:
                col = start + tl.arange(0, BLOCK_N)[None, :]
                attended = load_bool_mask(mask + col.to(tl.int64) * mask_col, col < k_stop)
                if tl.max(attended.to(tl.int32)) > 0:
                    m, total, acc = _step(
                        m,
                        total,
                        acc,
                        query,
                        k,
                        v,
                        mask,
                        attended,
                        padding,
                        padding_col,
                        seed,
                        dropout_row,
                        start,
                        last,
                        k_first,
                        k_stop,
                        k_row,
                        v_row,
                        mask_col,
                        scale,
                        softcap,
                        threshold,
                        factor,
                        key_range,
                        CAUSAL,
                        BIAS,
                        D,
                        DV,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_D,
                        BLOCK_DV,
                    )
            else:
                m, total, acc = _step(
                    m,
                    total,
                    acc,
                    query,
                    k,
                    v,
                    mask,
                    None,
                    padding,
                    padding_col,
                    seed,
                    dropout_row,
                    start,
                    last,
                    k_first,
                    k_stop,
                    k_row,
                    v_row,
                    mask_col,
                    scale,
                    softcap,
                    threshold,
                    factor,
                    key_range,
                    CAUSAL,
                    BIAS,
                    D,
                    DV,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK_DV,
                )
    return tl.where(m == float("-inf"), 0.0, m), total, acc
