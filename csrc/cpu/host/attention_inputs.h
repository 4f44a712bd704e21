// AttentionInputs: the checked arguments of an attention op, and their conversion to kernel
// arguments.
#pragma once

#include <algorithm>
#include <vector>

#include "../attention.h"
#include "../layer_norm.h"
#include "common.h"

namespace llmos {

inline MaskType mask_type(ScalarType dtype) {
  if (dtype == ScalarType::Bool) return MaskType::Bool;
  if (dtype == ScalarType::Float) return MaskType::Float;
  if (dtype == ScalarType::BFloat16) return MaskType::Bf16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, "no kernel for a mask of dtype ", int(dtype));
  return MaskType::F16;
}

// Return attn_mask, broadcast to four dimensions, as the kernels read it.
inline Mask mask_of(const Tensor& t) {
  const auto step = [&](int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  return {mask_type(t.scalar_type()), t.const_data_ptr(), step(0), step(1), step(2), step(3)};
}

// Set the masks of `a`: attn_mask, and key padding [batch, key].
template <class T>
void set_masks(AttentionCommonArgs<T>& a, const Optional& mask, const Optional& padding) {
  if (mask) a.mask = mask_of(*mask);
  if (!padding) return;
  a.padding = data<bool>(*padding);
  a.padding_batch_stride = padding->stride(0);
  a.padding_key_stride = padding->stride(1);
}

// Return one sequence for each batch element, of q_len queries and k_len keys. With key padding
// [batch, k_len], true where a key is ignored, ignored keys at either end are left out.
inline std::vector<Sequence> batch_sequences(int64_t batch, int64_t q_len, int64_t k_len,
                                             const Optional& padding, int64_t diagonal) {
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < batch; ++b) {
    Sequence s{b, 0, q_len, 0, k_len, 0, k_len, diagonal};
    if (padding) {
      const bool* ignored = data<bool>(*padding) + b * padding->stride(0);
      const int64_t step = padding->stride(1);
      while (s.first < s.last && ignored[s.first * step]) ++s.first;
      while (s.last > s.first && ignored[(s.last - 1) * step]) --s.last;
    }
    sequences.push_back(s);
  }
  return sequences;
}

// Return the last key that query 0 sees, counted from the diagonal of `causal`.
inline int64_t diagonal(int64_t causal, int64_t q_len, int64_t k_len) {
  return causal == 0 ? k_len : causal == 1 ? 0 : k_len - q_len;
}

// Return the varlen sequences that begin at cu_seqlens, of so many queries and keys in all.
inline std::vector<Sequence> varlen_sequences(const Tensor& cu_q_, const Tensor& cu_k_,
                                              int64_t q_total, int64_t k_total, int64_t causal) {
  const Tensor cu_q = llmos::contiguous(cu_q_), cu_k = llmos::contiguous(cu_k_);
  const int32_t *q = data<int32_t>(cu_q), *k = data<int32_t>(cu_k);
  const int64_t n = cu_q.numel() - 1;
  STD_TORCH_CHECK(q[0] == 0 && k[0] == 0 && q[n] == q_total && k[n] == k_total,
                  "attention: cu_seqlens must go from 0 to the total, ", q_total, " and ", k_total,
                  ", got ", q[0], " to ", q[n], " and ", k[0], " to ", k[n]);
  std::vector<Sequence> sequences;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t q_len = q[i + 1] - q[i], k_len = k[i + 1] - k[i];
    STD_TORCH_CHECK(q_len >= 0 && k_len >= 0, "attention: cu_seqlens must not fall, got ", q[i],
                    " to ", q[i + 1], " and ", k[i], " to ", k[i + 1]);
    sequences.push_back({0, q[i], q_len, k[i], k_len, 0, k_len, diagonal(causal, q_len, k_len)});
  }
  return sequences;
}

// The arguments that all attention ops share, checked.
struct AttentionInputs {
  Tensor query, key, value;
  Optional mask, padding;
  std::vector<Sequence> sequences;
  int64_t batch, heads, kv_heads, q_total, k_total, dim, v_dim, k_longest = 0, q_longest = 0;
  double scale, dropout_p, softcap;
  const Optional& seed;
  std::vector<float> sinks;  // Empty: none.

  AttentionInputs(const Tensor& query_, const Tensor& key_, const Tensor& value_,
                  const Optional& mask_, const Optional& padding_, const Optional& cu_q,
                  const Optional& cu_k, const Optional& sinks_, double scale_, int64_t causal,
                  double dropout_p_, double softcap_, const Optional& seed_)
      : query(with_contiguous_rows(query_)),
        key(with_contiguous_rows(key_)),
        value(with_contiguous_rows(value_)),
        mask(mask_),
        padding(padding_),
        batch(query.size(0)),
        heads(query.size(1)),
        kv_heads(key.size(1)),
        q_total(query.size(2)),
        k_total(key.size(2)),
        dim(query.size(3)),
        v_dim(value.size(3)),
        scale(scale_),
        dropout_p(dropout_p_),
        softcap(softcap_),
        seed(seed_) {
    STD_TORCH_CHECK(dim >= 1 && dim <= 256 && v_dim >= 1 && v_dim <= 256,
                    "attention: head dims must be from 1 to 256, got ", dim, " and ", v_dim);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "attention: ", heads,
                    " query heads cannot share ", kv_heads, " key heads");
    if (sinks_) {
      STD_TORCH_CHECK(sinks_->numel() == heads, "attention: expected ", heads, " sinks, got ",
                      sinks_->numel());
      sinks.resize(heads);
      const Tensor dense = llmos::contiguous(*sinks_);
      for_dtype(dense.scalar_type(), [&](auto w) {
        using W = decltype(w);
        to_float<W>.best()(data<W>(dense), sinks.data(), heads);
      });
    }
    if (cu_q)
      sequences = varlen_sequences(*cu_q, *cu_k, q_total, k_total, causal);
    else
      sequences =
          batch_sequences(batch, q_total, k_total, padding, diagonal(causal, q_total, k_total));
    for (const Sequence& s : sequences) {
      k_longest = std::max(k_longest, s.k_len);
      q_longest = std::max(q_longest, s.q_len);
    }
  }

  // Return a tensor whose last dimension is contiguous.
  static Tensor with_contiguous_rows(const Tensor& t) {
    return t.stride(3) == 1 || t.size(3) == 1 ? t : torch::stable::contiguous(t);
  }

  template <class T>
  static Heads<const T> heads_of(const Tensor& t) {
    return {data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
  }

  // Return the view of an output tensor [batch, row, head, element].
  template <class T>
  static Heads<T> output_heads(const Tensor& t) {
    return {mutable_data<T>(t), t.size(1) * t.size(2) * t.size(3), t.size(3),
            t.size(2) * t.size(3)};
  }

  template <class T>
  AttentionCommonArgs<T> of(float* m, float* inverse) const {
    AttentionCommonArgs<T> a{};
    a.query = heads_of<T>(query);
    a.key = heads_of<T>(key);
    a.value = heads_of<T>(value);
    set_masks(a, mask, padding);
    a.sequences = sequences.data();
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.q_total = q_total;
    a.k_longest = k_longest;
    a.dim = dim;
    a.v_dim = v_dim;
    a.scale = float(scale);
    a.softcap = float(softcap);
    a.sinks = sinks.empty() ? nullptr : sinks.data();
    a.dropout = dropout_of(dropout_p, seed);
    a.m = m;
    a.inverse = inverse;
    return a;
  }
};

// Compute the attention forward. args.common.sequences points to `sequences`.
template <class T>
void run_attention(const AttentionForwardArgs<T>& args, const std::vector<Sequence>& sequences);

// Return the block for task i of n. With a causal mask later blocks are more work: taking the last,
// the first, the second to last, ... gives each thread a similar amount.
inline int64_t alternating(int64_t i, int64_t n) { return i % 2 ? i / 2 : n - 1 - i / 2; }

}  // namespace llmos
