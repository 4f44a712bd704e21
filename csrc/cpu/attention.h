// What the attention loops are given; the formulas stand in llmos_kernels/ops/attention.py.
#pragma once

#include <cstdint>

#include "isa_table.h"
#include "dropout.h"
#include "task_kernel.h"

namespace llmos {

// A tensor [batch, head, row, element]: distances in elements, that of elements is 1.
template <class T>
struct Heads {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;

  T* at(int64_t b, int64_t h, int64_t r) const { return data + b * batch + h * head + r * row; }
};

enum class MaskType : uint8_t { None, Bool, Float, Bf16, F16 };

// attn_mask broadcast to [batch, head, query, key]: a distance is 0 where it is broadcast.
struct Mask {
  MaskType type = MaskType::None;
  const void* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

// One sequence: a batch element, or a packed sequence of batch element 0.
struct Sequence {
  int64_t batch, q_begin, q_len, k_begin, k_len;
  int64_t first, last;  // Keys that may be visible; padding may leave holes between.
  int64_t diagonal;     // Query i sees keys up to i + diagonal.
};

template <class T>
struct Attention {
  Heads<const T> query, key, value;
  Mask mask;
  const bool* padding;  // Null, or [batch][key], true where ignored.
  int64_t padding_batch, padding_key;
  const Sequence* sequences;
  int64_t heads, kv_heads, q_total, k_longest, dim, v_dim;
  float scale;
  Dropout dropout;
  float *m, *inverse;  // [batch][head][query], the halves of stats.

  int64_t group() const { return heads / kv_heads; }
  int64_t stats_at(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * q_total + i; }
};

// A block of query rows against the keys [begin, end), or a block of keys against all queries.
// Rows of a key head are those of its group, one query head after the other.
struct AttentionTask {
  int64_t sequence, kv_head, block, begin, end;
  float* partial;  // Null, or where unfinished rows go: v_dim sums, m and l each.
};

template <class T>
struct AttentionForward {
  using Task = AttentionTask;
  Attention<T> of;
  Heads<T> out;
};

template <class T>
struct AttentionWeights {
  using Task = AttentionTask;
  Attention<T> of;
  T* out;  // [batch][head, unless mean][query][key]
  bool mean;
};

template <class T>
struct AttentionBackward {
  using Task = AttentionTask;
  Attention<T> of;
  Heads<const T> dout, out;
  Heads<T> dquery, dkey, dvalue;
};

// The gradient of attn_mask in the mask's own shape [batch, heads, q_len, k_len], 1 where it is
// broadcast. A task adds up one block of query rows, or all of them where q_len is 1, over the
// batch and the heads that the mask is broadcast to.
template <class T>
struct AttentionMaskBackward {
  using Task = AttentionTask;
  AttentionBackward<T> of;
  float* dmask;  // Zeros at first.
  int64_t batch, heads, q_len, k_len;
  int64_t all_batch;
};

// out [v_dim] from `splits` partial rows, `stride` floats apart; returns m and 1 / l.
template <class T>
using CombineSplits = void (*)(const Attention<T>&, const float* partial, int64_t splits,
                               int64_t stride, T* out, float* m, float* inverse);
template <class T>
inline Dispatch<CombineSplits<T>> combine_splits;

}  // namespace llmos
