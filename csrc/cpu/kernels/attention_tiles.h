// Tiles of attention: a block of query rows, a tile of keys, and the logits between them.
//
// A tile of logits lies by keys: [key][row], so that a vector holds one key for several rows. The
// maximum and the sum of a row then need no reduction across lanes.
#pragma once

#include <limits>

#include "../attention.h"
#include "exp.h"
#include "philox.h"
#include "register_kernel.h"
#include "microkernel.h"

namespace llmos {
namespace {

constexpr int kBlock = 4 * kLanes;  // Rows in a block.
constexpr int64_t kTile = 128;      // Keys in a tile; a multiple of 4, as dropout is.
constexpr int kMaxDim = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using I32 = int32_t __attribute__((vector_size(4 * kLanes)));

// Up to kBlock query rows of one key head.
struct Block {
  int64_t rows, vectors;
  int64_t batch;
  int64_t head[kBlock], index[kBlock];  // Query head, and place in the tensor.
  int64_t mask_at[kBlock];
  alignas(64) int32_t limit[kBlock];                       // Keys before it are visible.
  alignas(64) uint32_t row_low[kBlock], row_high[kBlock];  // For dropout.
  int64_t limit_least, limit_most;
  bool one_mask_row;

  template <class T>
  [[gnu::noinline]] Block(const Attention<T>& a, const Sequence& s, int64_t first_head,
                          int64_t heads, int64_t begin)
      : rows(std::min<int64_t>(kBlock, heads * s.q_len - begin)),
        vectors(to_vectors(rows) / kLanes),
        batch(s.batch),
        limit_least(s.k_len),
        limit_most(0),
        one_mask_row(true) {
    for (int64_t r = 0; r < vectors * kLanes; ++r) {
      const int64_t row = begin + std::min(r, rows - 1), i = row % s.q_len;
      head[r] = first_head + row / s.q_len;
      index[r] = s.q_begin + i;
      const int64_t visible = std::clamp<int64_t>(i + s.diagonal + 1, 0, s.k_len);
      limit[r] = int32_t(visible);
      limit_least = std::min(limit_least, visible);
      limit_most = std::max(limit_most, visible);
      mask_at[r] = s.batch * a.mask.batch + head[r] * a.mask.head + index[r] * a.mask.query;
      one_mask_row &= mask_at[r] == mask_at[0];
      const uint64_t id = a.stats_at(s.batch, head[r], index[r]);
      row_low[r] = uint32_t(id);
      row_high[r] = uint32_t(id >> 32);
    }
  }
};

// to[unit][row] of the rows that row(r) points at; rows past the last are zeros.
template <class Unit, class RowOf>
[[gnu::noinline]] void pack_by_columns(const Block& block, int64_t dim, Unit* to, Unit* line,
                                       RowOf row) {
  const int64_t n = units<Unit>(dim);
  for (int64_t first = 0; first < block.vectors * kLanes; first += kLanes) {
    const Unit* lines[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      Unit* own = line + i * kMaxDim;
      lines[i] = own;
      const int64_t r = first + i;
      if (r < block.rows)
        pack_row(row(r), dim, n * kPerUnit<Unit>, own);
      else
        std::memset(own, 0, n * sizeof(Unit));
    }
    transpose_rows(lines, n, to + first, kBlock);
  }
}

// Whether key j of a sequence is ignored.
template <class T>
inline bool ignored(const Attention<T>& a, const Sequence& s, int64_t j) {
  return a.padding && a.padding[s.batch * a.padding_batch + (s.k_begin + j) * a.padding_key];
}

// Keys [begin, begin + count) of a sequence.
struct Keys {
  int64_t begin, count;
  bool hole[kTile];  // Which of them are ignored.
  bool holes, any;

  template <class T>
  Keys(const Attention<T>& a, const Sequence& s, int64_t begin_, int64_t end)
      : begin(begin_), count(std::min(kTile, end - begin_)), holes(false), any(!a.padding) {
    if (!a.padding) return;
    for (int64_t j = 0; j < count; ++j) {
      hole[j] = ignored(a, s, begin + j);
      holes |= hole[j];
      any |= !hole[j];
    }
  }
};

// Rows of a key or value head as a left operand: [key][unit]. Ignored ones are zeros: there may be
// NaN in them.
template <class Unit, class T>
[[gnu::noinline]] void pack_rows(const Heads<const T>& from, const Sequence& s, int64_t head,
                                 const Keys& keys, int64_t dim, Unit* to) {
  const int64_t n = units<Unit>(dim);
  for (int64_t j = 0; j < keys.count; ++j) {
    if (keys.holes && keys.hole[j])
      std::memset(to + j * n, 0, n * sizeof(Unit));
    else
      pack_row(from.at(s.batch, head, s.k_begin + keys.begin + j), dim, n * kPerUnit<Unit>,
               to + j * n);
  }
}

// `count` rows, row(j) each, as a right operand whose inner dimension they are; null is zeros.
template <class Unit, class T, class RowOf>
[[gnu::noinline]] void pack_inner(int64_t count, int64_t dim, Unit* to, RowOf row) {
  static const T zeros[kMaxDim] = {};
  const int64_t padded = to_vectors(dim);
  for (int64_t j = 0; j < count; j += 2) {
    const T *a = row(j), *b = j + 1 < count ? row(j + 1) : nullptr;
    if (kPerUnit<Unit> == 1 && j + 1 == count) {
      pack_row(a ? a : zeros, dim, padded, to + j * padded);
    } else {
      pack_two_rows(a ? a : zeros, b ? b : zeros, dim, padded, to + j / kPerUnit<Unit> * padded,
                    padded);
    }
  }
}

template <class Unit, class T>
inline void pack_inner_keys(const Heads<const T>& from, const Sequence& s, int64_t head,
                            const Keys& keys, int64_t dim, Unit* to) {
  pack_inner<Unit, T>(keys.count, dim, to, [&](int64_t j) -> const T* {
    if (keys.holes && keys.hole[j]) return nullptr;
    return from.at(s.batch, head, s.k_begin + keys.begin + j);
  });
}

struct Byte {
  uint8_t value;
};

// What a mask element does to a logit: one of bool is an upper bound, one of float is added.
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

// The lower halves of each lane, whose type the pointer tells.
inline F32 first_of_pairs(const bf16*, U32 pairs) { return std::bit_cast<F32>(pairs << 16); }
inline F32 first_of_pairs(const f16*, U32 pairs) {
  const U16 halves = narrow(pairs & 0xffff);
  f16 elements[kLanes];
  std::memcpy(elements, &halves, sizeof halves);
  return load<F32>(elements);
}

// Writes a tile of the mask, [key][row]; whether any of it lets a key be seen.
template <class M>
[[gnu::noinline]] bool pack_mask(const M* mask, int64_t key_step, const Block& block,
                                 const Keys& keys, float* to) {
  F32 top = F32{} - kInfinity;
  const auto put = [&](int64_t j, int64_t first, F32 v) {
    top = max(top, v);
    store(to + j * kBlock + first, v);
  };
  for (int64_t first = 0; first < block.vectors * kLanes; first += kLanes) {
    const int64_t* at = block.mask_at + first;
    int64_t j = 0;
    if (key_step == 1 && !block.one_mask_row) {
      if constexpr (sizeof(M) == 2) {  // Two keys in a lane: half the shuffles.
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
      if (block.one_mask_row)
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

inline bool pack_mask(const Mask& mask, const Block& block, const Keys& keys, float* to) {
  const auto run = [&](const auto* data) { return pack_mask(data, mask.key, block, keys, to); };
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

// How a product x = query . key becomes a weight. Units of float take exp(logit - shift). Pairs
// round it anyway, and fold the scale into a power of two, exp2(x * factor - shift); not with a
// float mask, which may hold the lowest float.
template <class Unit>
struct Exponent {
  static constexpr bool kPrecise = kPerUnit<Unit> == 1;
  bool natural;  // x is a logit already, not a product.
  float scale, factor;

  template <class T>
  explicit Exponent(const Attention<T>& a)
      : natural(a.mask.type > MaskType::Bool || a.scale == 0),
        scale(a.scale),
        factor(a.scale * kLog2E) {}

  F32 logit(F32 x) const { return natural ? x : x * scale; }
  F32 shift(F32 logit) const { return natural || kPrecise ? logit : logit * kLog2E; }
  F32 power(F32 x, F32 shift) const {
    if constexpr (kPrecise)
      return exp_negative(natural ? x - shift : fma(x, F32{} + scale, -shift));
    else
      return exp2_negative(natural ? (x - shift) * kLog2E : fma(x, F32{} + factor, -shift));
  }
  // What sums of powers have to be multiplied by when the shift changes.
  F32 change(F32 from, F32 to) const {
    return exp_negative((from - to) * (natural || kPrecise ? 1 : 1 / kLog2E));
  }
};

// Applies all masks to a tile of products; body(j, v, x) gets each vector, with x as Exponent
// takes it; products that change are stored.
template <int kVectors, class Unit, class Body>
[[gnu::always_inline]] inline void mask_products(const Block& block, const Keys& keys,
                                                 const Exponent<Unit>& exponent, MaskType type,
                                                 const float* mask, float* products, Body body) {
  const bool edge = block.limit_least < keys.begin + keys.count;
  if (!edge && !keys.holes && !exponent.natural && type == MaskType::None) {
    for (int64_t j = 0; j < keys.count; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) body(j, v, load<F32>(products + j * kBlock + v * kLanes));
    return;
  }
  if (!edge && !keys.holes && type > MaskType::Bool) {
    for (int64_t j = 0; j < keys.count; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = j * kBlock + v * kLanes;
        const F32 x = fma(load<F32>(products + at), F32{} + exponent.scale, load<F32>(mask + at));
        store(products + at, x);
        body(j, v, x);
      }
    return;
  }
  const F32 nothing = F32{} - kInfinity;
  for (int64_t j = 0; j < keys.count; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j * kBlock + v * kLanes;
      F32 x = load<F32>(products + at);
      if (type > MaskType::Bool) {
        x = fma(x, F32{} + exponent.scale, load<F32>(mask + at));
      } else {
        if (exponent.natural) x *= exponent.scale;
        if (type == MaskType::Bool) x = load<F32>(mask + at) == nothing ? nothing : x;
      }
      if (edge) {
        const I32 limit = load_bits<I32>(block.limit + v * kLanes);
        x = limit > int32_t(keys.begin + j) ? x : nothing;
      }
      if (keys.holes && keys.hole[j]) x = nothing;
      store(products + at, x);
      body(j, v, x);
    }
  }
}

// The dropout factors of four keys, from key j on (a multiple of 4), for kLanes rows.
[[gnu::noinline]] inline void dropout_of_keys(const Dropout& dropout, const Block& block,
                                              int64_t key, int v, F32 factors[4]) {
  U32 c[4] = {U32{} + uint32_t(key / 4), load_bits<U32>(block.row_low + v * kLanes),
              load_bits<U32>(block.row_high + v * kLanes), U32{} + uint32_t(dropout.offset)};
  philox(dropout, c);
  for (int i = 0; i < 4; ++i) factors[i] = dropout_factors(dropout, c[i]);
}

// Calls body with the number of vectors as a constant.
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
