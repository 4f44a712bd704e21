// Units of a product's inner dimension, and how matrices are packed into them.
//
// A unit has 32 bits: one float, or a pair of bfloat16 where the level multiplies such pairs
// (vdpbf16ps, tdpbf16ps). Of int8 it is four, where the level multiplies these (vpdpbusd,
// tdpbsud), else a pair of int16; the sums are int32 then.
#pragma once

#include <algorithm>

#include "vec.h"

namespace llmos {
namespace {

struct Pair {
  bf16 first, second;
};

// The instruction takes the right operand as uint8: kOffset more than the element.
struct Quad {
  int8_t elements[4];
};
struct IntPair {
  int16_t first, second;
};

#if defined(__AVX512BF16__)
using PairOrFloat = Pair;
#else
using PairOrFloat = float;
#endif
#if defined(__AVX512VNNI__)
using IntUnit = Quad;
#else
using IntUnit = IntPair;
#endif
template <class T>
using UnitOf = std::conditional_t<std::is_same_v<T, int8_t>, IntUnit,
                                  std::conditional_t<std::is_same_v<T, bf16>, PairOrFloat, float>>;

// Elements in a unit, and what one element is stored as.
template <class Unit>
constexpr int kPerUnit = std::is_same_v<Unit, Quad>    ? 4
                         : std::is_same_v<Unit, float> ? 1
                                                       : 2;
template <class Unit>
using Element = std::conditional_t<
    std::is_same_v<Unit, Quad>, int8_t,
    std::conditional_t<std::is_same_v<Unit, IntPair>, int16_t,
                       std::conditional_t<std::is_same_v<Unit, Pair>, bf16, float>>>;

template <class Unit>
constexpr bool kIsInt = std::is_same_v<Unit, Quad> || std::is_same_v<Unit, IntPair>;
constexpr int32_t kOffset = std::is_same_v<IntUnit, Quad> ? 128 : 0;

// What products are summed in, and a vector of it.
template <class Unit>
using SumOf = std::conditional_t<kIsInt<Unit>, int32_t, float>;
template <class Unit>
using SumsOf = std::conditional_t<kIsInt<Unit>, U32, F32>;

template <class Unit>
constexpr int64_t units(int64_t elements) {
  return (elements + kPerUnit<Unit> - 1) / kPerUnit<Unit>;
}

constexpr int64_t to_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// What a product does to what c holds: replaces it, adds to it, or adds to alpha[row] times it.
enum class Into { Replace, Add, Scale };

// Rows of elements of T as elements of a unit, zeros up to `padded` elements.
template <class Unit, class T>
[[gnu::always_inline]] inline void pack_row(const T* from, int64_t n, int64_t padded, Unit* to_) {
  auto* to = reinterpret_cast<Element<Unit>*>(to_);
  if constexpr (std::is_same_v<Element<Unit>, T>) {
    if (n) std::memcpy(to, from, n * sizeof(T));
  } else if constexpr (kIsInt<Unit>) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const I16 wide = __builtin_convertvector(load_bits<I8>(from + i), I16);
      std::memcpy(to + i, &wide, sizeof wide);
    }
    for (; i < n; ++i) to[i] = from[i];
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load<F32>(from + i));
    for (; i < n; ++i) store(to + i, load<float>(from + i));
  }
  if (padded > n) std::memset(to + n, 0, (padded - n) * sizeof(*to));
}

// kOffset on top of each element: its highest bit the other way. n is in whole vectors.
template <class Unit>
inline void add_offset(Unit* packed, int64_t n) {
  for (int64_t i = 0; std::is_same_v<Unit, Quad> && i < n; i += kLanes) {
    const U32 v = load_bits<U32>(packed + i) ^ 0x80808080;
    std::memcpy(packed + i, &v, sizeof v);
  }
}

// Turns kLanes vectors around: lane j of vector i goes to lane i of vector j.
[[gnu::always_inline]] inline void transpose(U32 (&v)[kLanes]) {
#pragma GCC unroll 5
  for (int width = 1; width < kLanes; width *= 2) {
    U32 out[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) zip(v[i], v[i + kLanes / 2], out[2 * i], out[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = out[i];
  }
}

// to[unit][row] of kLanes rows, given row pointers to packed rows of `count` units.
template <class Unit>
[[gnu::noinline]] void transpose_rows(const Unit* const* rows, int64_t count, Unit* to,
                                      int64_t to_step) {
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    U32 v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = load_bits<U32>(rows[i] + at);
    transpose(v);
    for (int i = 0; i < kLanes; ++i) std::memcpy(to + (at + i) * to_step, &v[i], sizeof v[i]);
  }
  for (; at < count; ++at)
    for (int i = 0; i < kLanes; ++i) to[at * to_step + i] = rows[i][at];
}

// to[row][unit] from [unit][row], whose rows are read up to whole vectors; to_step has room for
// whole vectors of units.
template <class Unit>
void turn_by_columns(int64_t rows, int64_t k, const Unit* from, int64_t step, Unit* to,
                     int64_t to_step) {
  for (int64_t i = 0; i < k; i += kLanes) {
    const Unit* lines[kLanes];
    for (int64_t n = 0; n < kLanes; ++n) lines[n] = from + std::min(i + n, k - 1) * step;
    transpose_rows(lines, to_vectors(rows), to + i, to_step);
  }
}

// Two rows a, b of `n` elements as units of an inner dimension that runs over the rows: with pairs
// (a0 b0) (a1 b1) ..., else a, then b to_step further.
template <class Unit, class T>
[[gnu::always_inline]] inline void pack_two_rows(const T* a, const T* b, int64_t n, int64_t padded,
                                                 Unit* to, int64_t to_step) {
  if constexpr (std::is_same_v<Unit, Pair>) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + kLanes <= n; i += kLanes) {
      const U32 first = widen(load_bits<U16>(a + i)), second = widen(load_bits<U16>(b + i)) << 16;
      const U32 both = first | second;
      std::memcpy(to + i, &both, sizeof both);
    }
#endif
    for (; i < n; ++i) to[i] = {a[i], b[i]};
    for (; i < padded; ++i) to[i] = {};
  } else {
    pack_row(a, n, padded, to);
    pack_row(b, n, padded, to + to_step);
  }
}

// One row of units whose inner dimension has two elements of each lane, first and second.
inline void store_pairs(float* to, F32 first, F32 second) {
#if defined(__AVX512BF16__)
  const __m512i both = __m512i(_mm512_cvtne2ps_pbh(__m512(second), __m512(first)));
  using U16x32 = uint16_t __attribute__((vector_size(64)));
  const U16x32 in_turn = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_permutexvar_epi16(__m512i(in_turn), both);
  std::memcpy(to, &pairs, sizeof pairs);
#endif
}
}  // namespace
}  // namespace llmos
