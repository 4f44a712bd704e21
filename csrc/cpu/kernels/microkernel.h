// Products of small matrices in scratch memory: by vectors, where a unit of the left operand is
// broadcast and the right operand is read by rows, or by the CPU's own matrix tiles.
#pragma once

#include "microkernel_amx.h"
#include "vnni_layout.h"

namespace llmos {
namespace {

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
// units of a and b and in floats of c. alpha [rows] with Into::Scale. By columns, a can be read up
// to whole vectors of rows.
template <class Unit, bool kByColumn, Into kInto>
[[gnu::noinline]] void product(int64_t rows, int64_t vectors, int64_t k, const Unit* a,
                               int64_t a_step, const Unit* b, int64_t b_step, SumOf<Unit>* c,
                               int64_t c_step, const float* alpha = nullptr) {
  if constexpr (kInTiles<Unit>) {
    if (k > 0)
      return tile_product<Unit, kByColumn, kInto>(rows, vectors, k, a, a_step, b, b_step, c, c_step,
                                                  alpha);
  }
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
  // Tiles add up parts of their own.
  if (kInTiles<Unit>)
    return product<Unit, kByColumn, kInto>(rows, vectors, k, a, a_step, b, b_step, c, c_step,
                                           alpha);
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
}  // namespace
}  // namespace llmos
