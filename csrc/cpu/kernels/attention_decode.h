// Products of a few query rows with keys and values where they lie: vectors along a row instead of
// one key for many rows. Memory is what bounds them, so nothing is packed.
#pragma once

#include "attention_tiles.h"

namespace llmos {
namespace {

constexpr int64_t kFew = 4;
constexpr int64_t kAhead = 16;  // Rows between what is read and what is fetched.

// Whether all the rows that share a key head are few.
template <class T>
inline bool are_few(const Attention<T>& a, const Sequence& s) {
  return a.group() * s.q_len <= kFew && a.dim % kLanes == 0 && a.v_dim % kLanes == 0;
}

template <class T>
inline void fetch(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
}

// products[key][row] of query [row][dim].
template <class T>
[[gnu::noinline]] void few_products(const Attention<T>& a, const Sequence& s, int64_t head,
                                    const Keys& keys, int64_t rows, const float* query,
                                    float* products) {
  const int64_t dim = a.dim;
  const auto key = [&](int64_t j) {
    return a.key.at(s.batch, head, s.k_begin + keys.begin + std::min(j, keys.count - 1));
  };
  for (int64_t begin = 0; begin < keys.count; begin += kLanes) {
    // The keys after these, also of the next tile, and the values that come after this tile's keys.
    for (int64_t i = begin; i < begin + kLanes; ++i) {
      const int64_t at = keys.begin + i, last = s.k_len - 1;
      fetch(a.key.at(s.batch, head, s.k_begin + std::min(at + kAhead, last)), dim);
      fetch(a.value.at(s.batch, head, s.k_begin + std::min(at, last)), a.v_dim);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* q = query + r * dim;
      U32 dots[kLanes];
      for (int i = 0; i < kLanes; i += 4) {
        const T* k[4] = {key(begin + i), key(begin + i + 1), key(begin + i + 2),
                         key(begin + i + 3)};
        F32 sum[4] = {};
        for (int64_t d = 0; d < dim; d += kLanes) {
          const F32 x = load<F32>(q + d);
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) sum[n] = fma(load<F32>(k[n] + d), x, sum[n]);
        }
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) dots[i + n] = std::bit_cast<U32>(sum[n]);
      }
      transpose(dots);
      F32 lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = std::bit_cast<F32>(dots[i]);
      for (int half = kLanes / 2; half > 0; half /= 2)  // By halves: few roundings of each.
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      const F32 total = lanes[0];
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, keys.count - begin); ++i)
        products[(begin + i) * kBlock + r] = total[i];
    }
  }
}

// products [key][row] of a block's query [unit][row] with key_rows, in every pass with the bits
// that the forward has: else a lone key's weight, which is 1, would keep the difference.
template <class T>
void query_products(const Attention<T>& a, const Sequence& s, int64_t head, const Block& block,
                    const Keys& keys, const UnitOf<T>* query, const UnitOf<T>* key_rows,
                    float* products) {
  if constexpr (kPerUnit<UnitOf<T>> == 1) {
    if (are_few(a, s)) {
      float rows[kFew * kMaxDim];
      for (int64_t r = 0; r < block.rows; ++r)
        for (int64_t d = 0; d < a.dim; ++d) rows[r * a.dim + d] = query[d * kBlock + r];
      for (int64_t j = 0; j < keys.count; ++j) store(products + j * kBlock, F32{});
      return few_products(a, s, head, keys, block.rows, rows, products);
    }
  }
  dots(keys.count, block.vectors, units<UnitOf<T>>(a.dim), key_rows, query, kBlock, products,
       kBlock);
}

// out [row][width] = alpha[row] * out + the values times powers [key][row].
template <class T, int kVectors>
inline void few_values(const Attention<T>& a, const Sequence& s, int64_t head, const Keys& keys,
                       int64_t row, int64_t from, const float* powers, float alpha, float* out) {
  constexpr int64_t kKeys = 8;  // A longer sum in one piece would lose digits.
  for (int64_t begin = 0; begin < keys.count; begin += kKeys) {
    F32 sum[kVectors] = {};
    for (int64_t j = begin; j < std::min(begin + kKeys, keys.count); ++j) {
      if (keys.holes && keys.hole[j]) continue;  // There may be NaN in it.
      const T* value = a.value.at(s.batch, head, s.k_begin + keys.begin + j) + from;
      const F32 power = F32{} + powers[j * kBlock + row];
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) sum[n] = fma(load<F32>(value + n * kLanes), power, sum[n]);
    }
    const F32 before = F32{} + (begin ? 1 : alpha);
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n)
      store(out + from + n * kLanes, fma(load<F32>(out + from + n * kLanes), before, sum[n]));
  }
}

template <class T>
[[gnu::noinline]] void few_values(const Attention<T>& a, const Sequence& s, int64_t head,
                                  const Keys& keys, int64_t rows, const float* powers,
                                  const float* alpha, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t from = 0;
    const auto run = [&](auto vectors) {
      for (; from + vectors * kLanes <= a.v_dim; from += vectors * kLanes)
        few_values<T, vectors>(a, s, head, keys, r, from, powers, alpha[r], out + r * a.v_dim);
    };
    run(std::integral_constant<int, 8>{});
    run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 1>{});
  }
}

}  // namespace
}  // namespace llmos
