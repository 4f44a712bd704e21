// Arguments of the attention kernels; llmos_kernels/ops/attention.py has the formulas.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "isa_table.h"
#include "task_kernel.h"

namespace llmos {

// A tensor [batch, head, row, element] with contiguous rows. Strides are counted in elements.
template <class T>
struct Heads {
  T* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  T* at(int64_t b, int64_t h, int64_t r) const {
    return data + b * batch_stride + h * head_stride + r * row_stride;
  }
};

enum class MaskType : uint8_t { None, Bool, Float, Bf16, F16 };

// attn_mask broadcast to [batch, head, query, key]. The stride of a broadcast dimension is 0.
struct Mask {
  MaskType type = MaskType::None;
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, query_stride = 0, key_stride = 0;
};

// One sequence: a batch element, or one of the sequences of a varlen batch (then batch is 0).
struct Sequence {
  int64_t batch, q_begin, q_len, k_begin, k_len;
  int64_t first, last;  // Keys outside [first, last) are padding. Keys inside may be padding, too.
  int64_t diagonal;     // Causal mask: query i sees keys up to i + diagonal.
};

template <class T>
struct AttentionCommonArgs {
  Heads<const T> query, key, value;
  Mask mask;
  // Key padding mask [batch][key], true where a key is ignored. Null: no padding.
  const bool* padding;
  int64_t padding_batch_stride, padding_key_stride;
  const Sequence* sequences;
  int64_t heads, kv_heads, q_total, k_longest, dim, v_dim;
  float scale;
  float softcap;       // Of the scores; 0: none.
  const float* sinks;  // [query head], a logit without a value. Null: none.
  Dropout dropout;
  // The two halves of stats, [batch][head][query]: the maximum logit, and 1 / sum(exp(logit - m)).
  // Both count the sink.
  float *m, *inverse;

  int64_t group() const { return heads / kv_heads; }
  int64_t stats_at(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * q_total + i; }
};

// A block of query rows against the keys [begin, end), or all rows of a key head in the backward.
// The query heads that share a key head (grouped-query attention) follow each other: their rows are
// rows of one block.
struct AttentionTask {
  int64_t sequence, kv_head, block, begin, end;
  // Split keys: where to write unnormalized rows, each v_dim sums, then m and l. Null: no split.
  float* partial;
};

template <class T>
struct AttentionForwardArgs {
  using Task = AttentionTask;
  AttentionCommonArgs<T> common;
  Heads<T> out;
};

template <class T>
struct AttentionWeightsArgs {
  using Task = AttentionTask;
  AttentionCommonArgs<T> common;
  T* out;  // [batch][head][query][key], without the head dimension if `mean`.
  bool mean;
};

// The gradient of attn_mask, in the mask's own shape: 1 for a broadcast dimension.
struct MaskGradient {
  float* data = nullptr;  // Each task clears its part. Null: not asked for.
  int64_t batch = 0, heads = 0, q_len = 0, k_len = 0;
  int64_t query_batch = 0;

  // Return the row for query i.
  float* row(int64_t b, int64_t h, int64_t i) const {
    const int64_t matrix = (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
    return data + (matrix * q_len + (q_len == 1 ? 0 : i)) * k_len;
  }
};

template <class T>
struct AttentionBackwardArgs {
  using Task = AttentionTask;
  AttentionCommonArgs<T> common;
  Heads<const T> dout, out;
  Heads<T> dquery, dkey, dvalue;
  float* sink_gradients;  // [batch][head][query], the part of each row. Null without sinks.
  // With data, a task takes all the heads and batch elements that `dmask` is broadcast to;
  // task.sequence and task.kv_head are the first of them, and no query heads share a key head.
  MaskGradient dmask = {};
};

// The gradient of attn_mask alone. A task sums one block of query rows (all of them if dmask.q_len
// is 1) over the batch and the heads that the mask is broadcast to; task.sequence and task.kv_head
// are its batch element and head of the mask.
template <class T>
struct AttentionMaskBackwardArgs {
  using Task = AttentionTask;
  AttentionBackwardArgs<T> backward;
};

// Combine the partial results of one row, `splits` of them, `stride` floats apart, with the sink of
// its head (-infinity: none) into out [v_dim], m and inverse.
template <class T>
using CombineSplitsFn = void (*)(const AttentionCommonArgs<T>&, const float* partial,
                                 int64_t splits, int64_t stride, float sink, T* out, float* m,
                                 float* inverse);
template <class T>
inline IsaTable<CombineSplitsFn<T>> combine_splits;

}  // namespace llmos
