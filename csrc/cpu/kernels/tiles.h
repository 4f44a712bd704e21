// Small matrices in scratch memory: how they are packed, and their product.
//
// A product steps over its inner dimension by units of 32 bits: one float, or a pair of bfloat16
// where the level multiplies such pairs (vdpbf16ps). Of int8 it is four, where the level multiplies
// these (vpdpbusd), else a pair of int16; the sums are int32 then. A unit of the left operand is
// broadcast, the right operand is read by rows of whole vectors.
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

constexpr float kLog2E = 1.44269504088896341f;

// b where a is not greater, so that NaN in b stays.
inline F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return F32(_mm512_max_ps(__m512(a), __m512(b)));
#else
  return a > b ? a : b;
#endif
}

constexpr int64_t to_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// acc + a * b in each lane; of pairs, the sum of both products.
template <class Unit>
[[gnu::always_inline]] inline SumsOf<Unit> multiply_add(U32 a, U32 b, SumsOf<Unit> acc) {
  if constexpr (kIsInt<Unit>) {
#if defined(__AVX512VNNI__)
    return U32(_mm512_dpbusd_epi32(__m512i(acc), __m512i(b), __m512i(a)));
#elif defined(__AVX512F__)
    return acc + U32(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
    return acc + U32(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#else
    const I32 high = (I32(a) >> 16) * (I32(b) >> 16);
    return acc + U32(high + (I32(a << 16) >> 16) * (I32(b << 16) >> 16));
#endif
  } else {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Unit, Pair>)
      return F32(_mm512_dpbf16_ps(__m512(acc), __m512bh(a), __m512bh(b)));
#endif
    return fma(std::bit_cast<F32>(a), std::bit_cast<F32>(b), acc);
  }
}

// What a product does to what c holds: replaces it, adds to it, or adds to alpha[row] times it.
enum class Into { Replace, Add, Scale };

// Vectors of a row of c that one step holds in registers, and rows of c.
#if defined(__AVX512F__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif
template <int kVectors>
constexpr int kRows = kColumns == 2   ? 6
                      : kVectors == 4 ? 6
                      : kVectors == 3 ? 8
                                      : 12;

// c[m][n] from a[m][k] and b[k][n]. kByColumn: a is stored by columns, a_step between them.
template <class Unit, bool kByColumn, Into kInto, int kM, int kN>
[[gnu::always_inline]] inline void step(const Unit* a, int64_t a_step, const Unit* b,
                                        int64_t b_step, int64_t k, SumOf<Unit>* c, int64_t c_step,
                                        const float* alpha) {
  using V = SumsOf<Unit>;
  V acc[kM][kN];
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) acc[m][n] = V{};
  for (int64_t i = 0; i < k; ++i) {
    U32 right[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) right[n] = load_bits<U32>(b + i * b_step + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      const Unit* at = kByColumn ? a + i * a_step + m : a + m * a_step + i;
      const U32 left = U32{} + load_bits<uint32_t>(at);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) acc[m][n] = multiply_add<Unit>(left, right[n], acc[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      // Sums of tiles are added, not carried on: a long sum in one piece would lose digits.
      SumOf<Unit>* at = c + m * c_step + n * kLanes;
      V sum = acc[m][n];
      if constexpr (kInto == Into::Add) sum += load_bits<V>(at);
      if constexpr (kInto == Into::Scale) sum = fma(load_bits<V>(at), V{} + alpha[m], sum);
      std::memcpy(at, &sum, sizeof sum);
    }
}

template <class Unit, bool kByColumn, Into kInto, int kN>
[[gnu::noinline]] void columns(int64_t rows, const Unit* a, int64_t a_step, const Unit* b,
                               int64_t b_step, int64_t k, SumOf<Unit>* c, int64_t c_step,
                               const float* alpha) {
  int64_t row = 0;
  const auto run = [&](auto count) {
    constexpr int kM = decltype(count)::value;
    for (; row + kM <= rows; row += kM)
      step<Unit, kByColumn, kInto, kM, kN>(a + row * (kByColumn ? 1 : a_step), a_step, b, b_step, k,
                                           c + row * c_step, c_step,
                                           kInto == Into::Scale ? alpha + row : nullptr);
  };
  run(std::integral_constant<int, kRows<kN>>{});
  if constexpr (kRows<kN> > 4) run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

// c [rows, vectors * kLanes] from a [rows, k] and b [k, vectors * kLanes]; k in units, steps in
// units of a and b and in floats of c. alpha [rows] with Into::Scale.
template <class Unit, bool kByColumn, Into kInto>
[[gnu::noinline]] void product(int64_t rows, int64_t vectors, int64_t k, const Unit* a,
                               int64_t a_step, const Unit* b, int64_t b_step, SumOf<Unit>* c,
                               int64_t c_step, const float* alpha = nullptr) {
  int64_t at = 0;
  const auto run = [&](auto count) {
    constexpr int kN = decltype(count)::value;
    for (; at + kN <= vectors; at += kN)
      columns<Unit, kByColumn, kInto, kN>(rows, a, a_step, b + at * kLanes, b_step, k,
                                          c + at * kLanes, c_step, alpha);
  };
  run(std::integral_constant<int, kColumns>{});
  if constexpr (kColumns > 2) run(std::integral_constant<int, 3>{});
  if constexpr (kColumns > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

constexpr int64_t kSumUnits = 32;  // A longer sum in one piece would lose digits.

// A product whose inner dimension is taken in parts.
template <class Unit, bool kByColumn, Into kInto>
inline void product_in_parts(int64_t rows, int64_t vectors, int64_t k, const Unit* a,
                             int64_t a_step, const Unit* b, int64_t b_step, float* c,
                             int64_t c_step, const float* alpha = nullptr) {
  product<Unit, kByColumn, kInto>(rows, vectors, std::min(k, kSumUnits), a, a_step, b, b_step, c,
                                  c_step, alpha);
  for (int64_t i = kSumUnits; i < k; i += kSumUnits)
    product<Unit, kByColumn, Into::Add>(rows, vectors, std::min(k - i, kSumUnits),
                                        a + i * (kByColumn ? a_step : 1), a_step, b + i * b_step,
                                        b_step, c, c_step);
}

// A product over a head dimension, whose rows lie packed.
template <class Unit>
inline void dots(int64_t rows, int64_t vectors, int64_t k, const Unit* a, const Unit* b,
                 int64_t b_step, float* c, int64_t c_step) {
  product_in_parts<Unit, false, Into::Replace>(rows, vectors, k, a, k, b, b_step, c, c_step);
}

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

// 2^whole in each lane, times p; whole is an integer.
[[gnu::always_inline]] inline F32 times_power_of_two(F32 p, F32 whole) {
#if defined(__AVX512F__)
  return F32(_mm512_scalef_ps(__m512(p), __m512(whole)));
#else
  const U32 scaled = std::bit_cast<U32>(p) + (std::bit_cast<U32>(whole + 0x1.8p23f) << 23);
  return p != p ? p : whole < -126 ? F32{} : std::bit_cast<F32>(scaled);
#endif
}

[[gnu::always_inline]] inline F32 round_to_whole(F32 t) {
#if defined(__AVX512F__)
  return F32(_mm512_roundscale_ps(__m512(t), _MM_FROUND_TO_NEAREST_INT));
#else
  return (t + 0x1.8p23f) - 0x1.8p23f;
#endif
}

// e^t to float's last digit, and 2^t to 1e-7, for t up to 0 or just above: -infinity gives 0, NaN
// stays NaN.
[[gnu::always_inline]] inline F32 exp_negative(F32 t) {
  t = max(F32{} - 200, t);
  const F32 whole = round_to_whole(t * kLog2E);
  F32 f = fma(whole, F32{} - 0x1.62e4p-1f, t);
  f = fma(whole, F32{} - 0x1.7f7d1cp-20f, f);
  F32 p = fma(f, F32{} + 1.381446674e-3f, F32{} + 8.368780429e-3f);
  p = fma(p, f, F32{} + 4.166839422e-2f);
  p = fma(p, f, F32{} + 1.666652011e-1f);
  p = fma(p, f, F32{} + 4.999999341e-1f);
  p = fma(p, f, F32{} + 1);
  return times_power_of_two(fma(p, f, F32{} + 1), whole);
}

[[gnu::always_inline]] inline F32 exp2_negative(F32 t) {
  t = max(F32{} - 200, t);
  const F32 whole = round_to_whole(t), f = t - whole;
  F32 p = fma(f, F32{} + 1.326472690e-3f, F32{} + 9.671512661e-3f);
  p = fma(p, f, F32{} + 5.550733744e-2f);
  p = fma(p, f, F32{} + 2.402224208e-1f);
  p = fma(p, f, F32{} + 6.931469776e-1f);
  return times_power_of_two(fma(p, f, F32{} + 1), whole);
}

}  // namespace
}  // namespace llmos
