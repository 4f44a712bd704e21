// Attention of few query rows (decoding): reads keys and values in place, with vectors along a row
// instead of one key for several rows. It is bound by memory bandwidth, so packing would not pay.
#pragma once

#include "attention_tiles.h"

namespace llmos {
namespace {

constexpr int64_t kDecodeMaxRows = 4;
constexpr int64_t kPrefetchRows = 16;  // How many rows ahead of the current one are prefetched.

// Return true if the query rows that share a key head are few enough for decode kernels.
template <class T>
inline bool uses_decode(const AttentionCommonArgs<T>& a, const Sequence& s) {
  return a.group() * s.q_len <= kDecodeMaxRows && a.dim % kLanes == 0 && a.v_dim % kLanes == 0;
}

template <class T>
inline void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
}

// Compute scores [key][row] of query [row][dim].
template <class T>
[[gnu::noinline]] void decode_scores(const AttentionCommonArgs<T>& a, const Sequence& s,
                                     int64_t head, const KeyTile& keys, int64_t rows,
                                     const float* query, float* scores) {
  const int64_t dim = a.dim;
  const auto key = [&](int64_t j) {
    return a.key.at(s.batch, head, s.k_begin + keys.begin + std::min(j, keys.count - 1));
  };
  for (int64_t begin = 0; begin < keys.count; begin += kLanes) {
    // Prefetch the next keys, also those of the next tile, and the values of this tile.
    for (int64_t i = begin; i < begin + kLanes; ++i) {
      const int64_t at = keys.begin + i, last = s.k_len - 1;
      prefetch_row(a.key.at(s.batch, head, s.k_begin + std::min(at + kPrefetchRows, last)), dim);
      prefetch_row(a.value.at(s.batch, head, s.k_begin + std::min(at, last)), a.v_dim);
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
      for (int half = kLanes / 2; half > 0; half /= 2)  // Pairwise, to round each sum few times.
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      const F32 total = lanes[0];
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, keys.count - begin); ++i)
        scores[(begin + i) * kBlock + r] = total[i];
    }
  }
}

// Compute scores [key][row] from a block's query [word][row] and key_rows, with the same bits as
// in the forward. With other bits exp(score - m) would not be exactly 1 for a row that sees one
// key.
template <class T>
void query_key_scores(const AttentionCommonArgs<T>& a, const Sequence& s, int64_t head,
                      const QueryBlock& block, const KeyTile& keys, const WordOf<T>* query,
                      const WordOf<T>* key_rows, float* scores) {
  if constexpr (kPerWord<WordOf<T>> == 1) {
    if (uses_decode(a, s)) {
      float rows[kDecodeMaxRows * kMaxDim];
      for (int64_t r = 0; r < block.rows; ++r)
        for (int64_t d = 0; d < a.dim; ++d) rows[r * a.dim + d] = query[d * kBlock + r];
      for (int64_t j = 0; j < keys.count; ++j) store(scores + j * kBlock, F32{});
      return decode_scores(a, s, head, keys, block.rows, rows, scores);
    }
  }
  head_dim_gemm(keys.count, block.vectors, words<WordOf<T>>(a.dim), key_rows, query, kBlock, scores,
                kBlock);
}

// out [row][width] = alpha[row] * out + weights^T value, with weights [key][row].
template <class T, int kVectors>
inline void decode_values(const AttentionCommonArgs<T>& a, const Sequence& s, int64_t head,
                          const KeyTile& keys, int64_t row, int64_t from, const float* weights,
                          float alpha, float* out) {
  constexpr int64_t kKeys = 8;  // Keys per partial sum: one long float32 sum would be less precise.
  for (int64_t begin = 0; begin < keys.count; begin += kKeys) {
    F32 sum[kVectors] = {};
    for (int64_t j = begin; j < std::min(begin + kKeys, keys.count); ++j) {
      if (keys.any_ignored && keys.ignored[j]) continue;  // An ignored value may be NaN.
      const T* value = a.value.at(s.batch, head, s.k_begin + keys.begin + j) + from;
      const F32 weight = F32{} + weights[j * kBlock + row];
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n)
        sum[n] = fma(load<F32>(value + n * kLanes), weight, sum[n]);
    }
    const F32 before = F32{} + (begin ? 1 : alpha);
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n)
      store(out + from + n * kLanes, fma(load<F32>(out + from + n * kLanes), before, sum[n]));
  }
}

template <class T>
[[gnu::noinline]] void decode_values(const AttentionCommonArgs<T>& a, const Sequence& s,
                                     int64_t head, const KeyTile& keys, int64_t rows,
                                     const float* weights, const float* alpha, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t from = 0;
    const auto run = [&](auto vectors) {
      for (; from + vectors * kLanes <= a.v_dim; from += vectors * kLanes)
        decode_values<T, vectors>(a, s, head, keys, r, from, weights, alpha[r], out + r * a.v_dim);
    };
    run(std::integral_constant<int, 8>{});
    run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 1>{});
  }
}

}  // namespace
}  // namespace llmos
