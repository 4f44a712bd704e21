// The parts that the attention kernels share: a block of query rows, a tile of keys, masks, the
// softmax exponential, and dropout.
//
// Scores and logits of a tile are stored as [key][row]: a vector holds one key for several rows, so
// the maximum and the sum of a row need no reduction across lanes. A score is query . key, a logit
// is scale * score + mask. With a softcap, cap_scores turns query . key into the score
// softcap * tanh(a.scale * (query . key) / softcap): it is scaled already, so scale is 1 in the
// logit.
#pragma once

#include <limits>

#include "../attention.h"
#include "exp.h"
#include "microkernel.h"
#include "philox.h"
#include "register_kernel.h"

namespace llmos {
namespace {

constexpr int kBlock = 4 * kLanes;  // Query rows in a block.
// Keys in a tile; a multiple of 4, because one Philox call makes the factors of 4 keys.
constexpr int64_t kTile = 128;
constexpr int kMaxDim = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using I32 = int32_t __attribute__((vector_size(4 * kLanes)));

// Up to kBlock query rows that share a key head.
struct QueryBlock {
  int64_t rows, vectors;
  int64_t batch;
  int64_t head[kBlock], index[kBlock];  // Query head, and row in the tensor.
  int64_t mask_offset[kBlock];          // Of the first element of the row of the mask.
  alignas(64) int32_t limit[kBlock];    // Causal mask: only keys before it are visible.
  alignas(64) uint32_t row_low[kBlock], row_high[kBlock];  // The row number in the dropout mask.
  int64_t min_limit, max_limit;
  bool same_mask_row;

  template <class T>
  [[gnu::noinline]] QueryBlock(const AttentionCommonArgs<T>& a, const Sequence& s,
                               int64_t first_head, int64_t heads, int64_t begin)
      : rows(std::min<int64_t>(kBlock, heads * s.q_len - begin)),
        vectors(to_vectors(rows) / kLanes),
        batch(s.batch),
        min_limit(s.k_len),
        max_limit(0),
        same_mask_row(true) {
    // Lanes past the last row repeat it.
    for (int64_t r = 0; r < vectors * kLanes; ++r) {
      const int64_t row = begin + std::min(r, rows - 1), i = row % s.q_len;
      head[r] = first_head + row / s.q_len;
      index[r] = s.q_begin + i;
      const int64_t visible = std::clamp<int64_t>(i + s.diagonal + 1, 0, s.k_len);
      limit[r] = int32_t(visible);
      min_limit = std::min(min_limit, visible);
      max_limit = std::max(max_limit, visible);
      mask_offset[r] = s.batch * a.mask.batch_stride + head[r] * a.mask.head_stride +
                       index[r] * a.mask.query_stride;
      same_mask_row &= mask_offset[r] == mask_offset[0];
      const uint64_t id = a.stats_at(s.batch, head[r], index[r]);
      row_low[r] = uint32_t(id);
      row_high[r] = uint32_t(id >> 32);
    }
  }
};

// Pack the rows that row(r) points at to [word][row]. Rows past the last are zeros.
template <class Word, class RowOf>
[[gnu::noinline]] void pack_by_columns(const QueryBlock& block, int64_t dim, Word* to, Word* line,
                                       RowOf row) {
  const int64_t n = words<Word>(dim);
  for (int64_t first = 0; first < block.vectors * kLanes; first += kLanes) {
    const Word* lines[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      Word* row_words = line + i * kMaxDim;
      lines[i] = row_words;
      const int64_t r = first + i;
      if (r < block.rows)
        pack_row(row(r), dim, n * kPerWord<Word>, row_words);
      else
        std::memset(row_words, 0, n * sizeof(Word));
    }
    transpose_rows(lines, n, to + first, kBlock);
  }
}

// Return true if key padding excludes key j of a sequence.
template <class T>
inline bool is_ignored(const AttentionCommonArgs<T>& a, const Sequence& s, int64_t j) {
  return a.padding &&
         a.padding[s.batch * a.padding_batch_stride + (s.k_begin + j) * a.padding_key_stride];
}

// Keys [begin, begin + count) of a sequence.
struct KeyTile {
  int64_t begin, count;
  bool ignored[kTile];  // By key padding.
  bool any_ignored, any_unpadded;

  template <class T>
  KeyTile(const AttentionCommonArgs<T>& a, const Sequence& s, int64_t begin_, int64_t end)
      : begin(begin_),
        count(std::min(kTile, end - begin_)),
        any_ignored(false),
        any_unpadded(!a.padding) {
    if (!a.padding) return;
    for (int64_t j = 0; j < count; ++j) {
      ignored[j] = is_ignored(a, s, begin + j);
      any_ignored |= ignored[j];
      any_unpadded |= !ignored[j];
    }
  }
};

// Pack rows of a key or value head as a left operand, [key][word]. Ignored rows become zeros: they
// may hold NaN.
template <class Word, class T>
[[gnu::noinline]] void pack_rows(const Heads<const T>& from, const Sequence& s, int64_t head,
                                 const KeyTile& keys, int64_t dim, Word* to) {
  const int64_t n = words<Word>(dim);
  for (int64_t j = 0; j < keys.count; ++j) {
    if (keys.any_ignored && keys.ignored[j])
      std::memset(to + j * n, 0, n * sizeof(Word));
    else
      pack_row(from.at(s.batch, head, s.k_begin + keys.begin + j), dim, n * kPerWord<Word>,
               to + j * n);
  }
}

// Pack `count` rows, row(j) each, as the right operand of a product that sums over these rows: with
// two elements per word, a word holds one column of two consecutive rows. A null pointer stands for
// a row of zeros.
template <class Word, class T, class RowOf>
[[gnu::noinline]] void pack_inner(int64_t count, int64_t dim, Word* to, RowOf row) {
  static const T zeros[kMaxDim] = {};
  const int64_t padded = to_vectors(dim);
  for (int64_t j = 0; j < count; j += 2) {
    const T *a = row(j), *b = j + 1 < count ? row(j + 1) : nullptr;
    if (kPerWord<Word> == 1 && j + 1 == count) {
      pack_row(a ? a : zeros, dim, padded, to + j * padded);
    } else {
      pack_row_pair(a ? a : zeros, b ? b : zeros, dim, padded, to + j / kPerWord<Word> * padded,
                    padded);
    }
  }
}

template <class Word, class T>
inline void pack_inner_keys(const Heads<const T>& from, const Sequence& s, int64_t head,
                            const KeyTile& keys, int64_t dim, Word* to) {
  pack_inner<Word, T>(keys.count, dim, to, [&](int64_t j) -> const T* {
    if (keys.any_ignored && keys.ignored[j]) return nullptr;
    return from.at(s.batch, head, s.k_begin + keys.begin + j);
  });
}

struct Byte {
  uint8_t value;
};

// Return a marker for an element of a bool mask: -infinity where it hides the key, else infinity.
// mask_scores compares it and never adds it.
template <class V>
inline V load(const Byte* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return p->value ? kInfinity : -kInfinity;
  } else {
    using U8 = uint8_t __attribute__((vector_size(kLanes)));
    const U32 set = __builtin_convertvector(load_bits<U8>(p), U32);
    return set != 0 ? F32{} + kInfinity : F32{} - kInfinity;
  }
}

// Return the 16-bit elements in the low halves of the lanes, as floats. The pointer gives their
// type.
inline F32 first_of_pairs(const bf16*, U32 pairs) { return std::bit_cast<F32>(pairs << 16); }
inline F32 first_of_pairs(const f16*, U32 pairs) {
  const U16 halves = narrow(pairs & 0xffff);
  f16 elements[kLanes];
  std::memcpy(elements, &halves, sizeof halves);
  return load<F32>(elements);
}

// Write a tile of the mask, [key][row]. Returns false if it masks every key.
template <class M>
[[gnu::noinline]] bool pack_mask(const M* mask, int64_t key_step, const QueryBlock& block,
                                 const KeyTile& keys, float* to) {
  F32 top = F32{} - kInfinity;
  const auto put = [&](int64_t j, int64_t first, F32 v) {
    top = max(top, v);
    store(to + j * kBlock + first, v);
  };
  for (int64_t first = 0; first < block.vectors * kLanes; first += kLanes) {
    const int64_t* at = block.mask_offset + first;
    int64_t j = 0;
    if (key_step == 1 && !block.same_mask_row) {
      if constexpr (sizeof(M) == 2) {  // Two keys in a lane: half as many shuffles.
        for (; j + 2 * kLanes <= keys.count; j += 2 * kLanes) {
          U32 v[kLanes];
          for (int i = 0; i < kLanes; ++i) v[i] = load_bits<U32>(mask + at[i] + keys.begin + j);
          transpose(v);
          for (int i = 0; i < kLanes; ++i) {
            put(j + 2 * i, first, first_of_pairs(mask, v[i]));
            put(j + 2 * i + 1, first, first_of_pairs(mask, v[i] >> 16));
          }
        }
      }
      for (; j + kLanes <= keys.count; j += kLanes) {
        U32 v[kLanes];
        for (int i = 0; i < kLanes; ++i)
          v[i] = std::bit_cast<U32>(load<F32>(mask + at[i] + keys.begin + j));
        transpose(v);
        for (int i = 0; i < kLanes; ++i) put(j + i, first, std::bit_cast<F32>(v[i]));
      }
    }
    for (; j < keys.count; ++j) {
      const M* key = mask + (keys.begin + j) * key_step;
      F32 v;
      if (block.same_mask_row)
        v = F32{} + load<float>(key + at[0]);
      else
        for (int i = 0; i < kLanes; ++i) v[i] = load<float>(key + at[i]);
      put(j, first, v);
    }
  }
  for (int i = 0; i < kLanes; ++i)
    if (top[i] != -kInfinity) return true;
  return false;
}

inline bool pack_mask(const Mask& mask, const QueryBlock& block, const KeyTile& keys, float* to) {
  const auto run = [&](const auto* data) {
    return pack_mask(data, mask.key_stride, block, keys, to);
  };
  switch (mask.type) {
    case MaskType::Bool:
      return run(static_cast<const Byte*>(mask.data));
    case MaskType::Float:
      return run(static_cast<const float*>(mask.data));
    case MaskType::Bf16:
      return run(static_cast<const bf16*>(mask.data));
    case MaskType::F16:
      return run(static_cast<const f16*>(mask.data));
    default:
      return true;
  }
}

// How a score x becomes an unnormalized weight. With a float mask or scale 0, mask_scores has
// already computed the logit, and the weight is exp(x - shift). Else, with float words, it is
// exp(x * scale - shift), and with bfloat16 pairs, which round the weight anyway, exp2(x * factor -
// shift), where factor = scale * log2(e). A float mask may hold -FLT_MAX, which times log2(e) would
// overflow: so its logits are not scaled.
template <class Word>
struct SoftmaxExp {
  static constexpr bool kPrecise = kPerWord<Word> == 1;
  float scale, factor;
  bool takes_logits;  // x is a logit already, not a score.
  float multiplier;   // Of x in the exponent, where the exponential is precise.

  template <class T>
  explicit SoftmaxExp(const AttentionCommonArgs<T>& a)
      : scale(a.softcap == 0 ? a.scale : 1),
        factor(scale * kLog2E),
        takes_logits(a.mask.type > MaskType::Bool || scale == 0),
        multiplier(takes_logits ? 1 : scale) {}

  F32 logit(F32 x) const { return takes_logits ? x : x * scale; }
  F32 shift(F32 logit) const { return takes_logits || kPrecise ? logit : logit * kLog2E; }
  F32 exp(F32 x, F32 shift) const {
    if constexpr (kPrecise)
      return exp_negative(fma(x, F32{} + multiplier, -shift));
    else
      return exp2_negative(takes_logits ? (x - shift) * kLog2E : fma(x, F32{} + factor, -shift));
  }
  // Return the factor for existing sums when the shift changes.
  F32 rescale(F32 from, F32 to) const {
    return exp_negative((from - to) * (takes_logits || kPrecise ? 1 : 1 / kLog2E));
  }
  // Return the weight of a sink, which is a logit whatever x is.
  F32 exp_sink(F32 sink, F32 shift) const {
    if constexpr (kPrecise)
      return exp_negative(sink - shift);
    else
      return exp2_negative(takes_logits ? (sink - shift) * kLog2E
                                        : fma(sink, F32{} + kLog2E, -shift));
  }
  // Add a sink to the sum l of exponentials, whose maximum logit is m. Returns the factor for sums
  // of values.
  F32 add_sink(F32 sink, F32& m, F32& l) const {
    const F32 top = max(l == 0 ? F32{} - kInfinity : m, sink);
    const F32 finite = top == -kInfinity ? F32{} : top;
    const F32 alpha = l == 0 ? F32{} : rescale(shift(m), shift(finite));
    l = l * alpha + exp_sink(sink, shift(finite));
    m = finite;
    return alpha;
  }
};

// Turn products query . key into capped scores, in place. Their derivatives by scale * query . key
// go to `slopes` unless it is null.
template <class T>
[[gnu::noinline]] void cap_scores(const AttentionCommonArgs<T>& a, int64_t keys, int64_t vectors,
                                  float* scores, float* slopes) {
  const float factor = a.scale / a.softcap;
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t at = j * kBlock; at < j * kBlock + vectors * kLanes; at += kLanes) {
      const F32 t = tanh(load<F32>(scores + at) * factor);
      store(scores + at, t * a.softcap);
      if (slopes) store(slopes + at, 1 - t * t);
    }
}

// Apply all masks to a tile of scores, in place. Calls body(j, v, x) for key j and row vector v; x
// is the masked score, or the logit if softmax_exp.takes_logits.
template <int kVectors, class Word, class Body>
[[gnu::always_inline]] inline void mask_scores(const QueryBlock& block, const KeyTile& keys,
                                               const SoftmaxExp<Word>& softmax_exp, MaskType type,
                                               const float* mask, float* scores, Body body) {
  const bool has_limit = block.min_limit < keys.begin + keys.count;
  if (!has_limit && !keys.any_ignored && !softmax_exp.takes_logits && type == MaskType::None) {
    for (int64_t j = 0; j < keys.count; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) body(j, v, load<F32>(scores + j * kBlock + v * kLanes));
    return;
  }
  if (!has_limit && !keys.any_ignored && type > MaskType::Bool) {
    for (int64_t j = 0; j < keys.count; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = j * kBlock + v * kLanes;
        const F32 x = fma(load<F32>(scores + at), F32{} + softmax_exp.scale, load<F32>(mask + at));
        store(scores + at, x);
        body(j, v, x);
      }
    return;
  }
  const F32 masked = F32{} - kInfinity;
  for (int64_t j = 0; j < keys.count; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j * kBlock + v * kLanes;
      F32 x = load<F32>(scores + at);
      if (type > MaskType::Bool) {
        x = fma(x, F32{} + softmax_exp.scale, load<F32>(mask + at));
      } else {
        if (softmax_exp.takes_logits) x *= softmax_exp.scale;
        if (type == MaskType::Bool) x = load<F32>(mask + at) == masked ? masked : x;
      }
      if (has_limit) {
        const I32 limit = load_bits<I32>(block.limit + v * kLanes);
        x = limit > int32_t(keys.begin + j) ? x : masked;
      }
      if (keys.any_ignored && keys.ignored[j]) x = masked;
      store(scores + at, x);
      body(j, v, x);
    }
  }
}

// Compute the dropout factors of four keys, from `key` on (a multiple of 4), for kLanes rows.
[[gnu::noinline]] inline void dropout_of_keys(const Dropout& dropout, const QueryBlock& block,
                                              int64_t key, int v, F32 factors[4]) {
  U32 c[4] = {U32{} + uint32_t(key / 4), load_bits<U32>(block.row_low + v * kLanes),
              load_bits<U32>(block.row_high + v * kLanes), U32{} + uint32_t(dropout.offset)};
  philox(dropout, c);
  for (int i = 0; i < 4; ++i) factors[i] = dropout_factors(dropout, c[i]);
}

// Call body with the number of vectors as a compile-time constant.
template <class Body>
inline void with_vectors(int64_t vectors, Body body) {
  switch (vectors) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, 4>{});
  }
}

}  // namespace
}  // namespace llmos
