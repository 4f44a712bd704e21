// Micro-kernels: GEMMs of small matrices that are packed in scratch memory. Vector code broadcasts
// a word of the left operand and multiplies it by a row of the right operand; on CPUs with AMX,
// bfloat16 and int8 use its tiles instead.
#pragma once

#include "microkernel_amx.h"
#include "vnni_layout.h"

namespace llmos {
namespace {

// Return acc + a * b for each 32-bit lane: the sum of the products of all elements of a word.
template <class Word>
[[gnu::always_inline]] inline AccumulatorVectorOf<Word> multiply_add(
    U32 a, U32 b, AccumulatorVectorOf<Word> acc) {
  if constexpr (kIsInt<Word>) {
#if defined(__AVX512VNNI__)
    return U32(_mm512_dpbusd_epi32(__m512i(acc), __m512i(b), __m512i(a)));
#elif defined(__AVX512F__)
    return acc + U32(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
    return acc + U32(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
    return acc + U32(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
    const I32 high = (I32(a) >> 16) * (I32(b) >> 16);
    return acc + U32(high + (I32(a << 16) >> 16) * (I32(b << 16) >> 16));
#endif
  } else {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Word, Bf16x2>)
      return F32(_mm512_dpbf16_ps(__m512(acc), __m512bh(a), __m512bh(b)));
#endif
    return fma(std::bit_cast<F32>(a), std::bit_cast<F32>(b), acc);
  }
}

// The block of c that a micro-kernel keeps in registers: vectors of a row, and rows.
#if defined(__AVX512F__)
constexpr int kMicroVectors = 4;
#else
constexpr int kMicroVectors = 2;
#endif
template <int kVectors>
constexpr int kMicroRows = kMicroVectors == 2 ? 6
                           : kVectors == 4    ? 6
                           : kVectors == 3    ? 8
                                              : 12;

// c[m][n] (+)= sum over k of a[m][k] b[k][n]. With kByColumn, a is stored as [k][m].
template <class Word, bool kByColumn, Update kUpdate, int kM, int kN>
[[gnu::always_inline]] inline void microkernel(const Word* a, int64_t a_step, const Word* b,
                                               int64_t b_step, int64_t k, AccumulatorOf<Word>* c,
                                               int64_t c_step, const float* alpha) {
  using V = AccumulatorVectorOf<Word>;
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
      const Word* at = kByColumn ? a + i * a_step + m : a + m * a_step + i;
      const U32 left = U32{} + load_bits<uint32_t>(at);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) acc[m][n] = multiply_add<Word>(left, right[n], acc[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      // Partial sums are added up, not continued: one long float32 sum would be less precise.
      AccumulatorOf<Word>* at = c + m * c_step + n * kLanes;
      V sum = acc[m][n];
      if constexpr (kUpdate == Update::Add) sum += load_bits<V>(at);
      if constexpr (kUpdate == Update::ScaleAdd) sum = fma(load_bits<V>(at), V{} + alpha[m], sum);
      std::memcpy(at, &sum, sizeof sum);
    }
}

// Rows of memory that are fetched into the L2 cache while others are multiplied.
struct NextRows {
  const char* first = nullptr;
  int64_t step = 0, bytes = 0;  // Between rows, and of each row.

  [[gnu::always_inline]] void fetch(int64_t row, int64_t rows) const {
    constexpr int64_t kLine = 64;
    for (int64_t i = row; i < row + rows; ++i)
      for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(first + i * step + at, 0, 2);
  }
};

template <class Word, bool kByColumn, Update kUpdate, int kN>
[[gnu::noinline]] void vector_block(int64_t rows, const Word* a, int64_t a_step, const Word* b,
                                    int64_t b_step, int64_t k, AccumulatorOf<Word>* c,
                                    int64_t c_step, const float* alpha, const NextRows& next) {
  int64_t row = 0;
  const auto run = [&](auto count) {
    constexpr int kM = decltype(count)::value;
    for (; row + kM <= rows; row += kM) {
      next.fetch(row, kM);
      microkernel<Word, kByColumn, kUpdate, kM, kN>(
          a + row * (kByColumn ? 1 : a_step), a_step, b, b_step, k, c + row * c_step, c_step,
          kUpdate == Update::ScaleAdd ? alpha + row : nullptr);
    }
  };
  run(std::integral_constant<int, kMicroRows<kN>>{});
  if constexpr (kMicroRows<kN> > 4) run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

// Compute c [rows, vectors * kLanes] from a [rows, k] and b [k, vectors * kLanes]. k counts words;
// the steps between rows count words of a and b, and elements of c. Update::ScaleAdd needs alpha
// [rows]. With kByColumn, a is [k, rows] and is read up to whole vectors of rows. With each row of
// a, one of `next` is fetched.
template <class Word, bool kByColumn, Update kUpdate>
[[gnu::noinline]] void small_gemm(int64_t rows, int64_t vectors, int64_t k, const Word* a,
                                  int64_t a_step, const Word* b, int64_t b_step,
                                  AccumulatorOf<Word>* c, int64_t c_step,
                                  const float* alpha = nullptr, NextRows next = {}) {
  if constexpr (kUsesAmx<Word>) {
    if (k > 0)
      return amx_gemm<Word, kByColumn, kUpdate>(rows, vectors, k, a, a_step, b, b_step, c, c_step,
                                                alpha);
  }
  int64_t at = 0;
  const auto run = [&](auto count) {
    constexpr int kN = decltype(count)::value;
    for (; at + kN <= vectors; at += kN) {
      vector_block<Word, kByColumn, kUpdate, kN>(rows, a, a_step, b + at * kLanes, b_step, k,
                                                 c + at * kLanes, c_step, alpha, next);
      next = {};
    }
  };
  run(std::integral_constant<int, kMicroVectors>{});
  if constexpr (kMicroVectors > 2) run(std::integral_constant<int, 3>{});
  if constexpr (kMicroVectors > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

// Words per partial sum: one long float32 sum would be less precise.
constexpr int64_t kWordsPerSum = 32;

// A small GEMM that splits k into partial sums of kWordsPerSum words.
template <class Word, bool kByColumn, Update kUpdate>
inline void small_gemm_in_parts(int64_t rows, int64_t vectors, int64_t k, const Word* a,
                                int64_t a_step, const Word* b, int64_t b_step, float* c,
                                int64_t c_step, const float* alpha = nullptr) {
  // The AMX code splits k itself.
  if (kUsesAmx<Word>)
    return small_gemm<Word, kByColumn, kUpdate>(rows, vectors, k, a, a_step, b, b_step, c, c_step,
                                                alpha);
  small_gemm<Word, kByColumn, kUpdate>(rows, vectors, std::min(k, kWordsPerSum), a, a_step, b,
                                       b_step, c, c_step, alpha);
  for (int64_t i = kWordsPerSum; i < k; i += kWordsPerSum)
    small_gemm<Word, kByColumn, Update::Add>(rows, vectors, std::min(k - i, kWordsPerSum),
                                             a + i * (kByColumn ? a_step : 1), a_step,
                                             b + i * b_step, b_step, c, c_step);
}

// A small GEMM whose inner dimension is a head dimension: the rows of a are adjacent.
template <class Word>
inline void head_dim_gemm(int64_t rows, int64_t vectors, int64_t k, const Word* a, const Word* b,
                          int64_t b_step, float* c, int64_t c_step) {
  small_gemm_in_parts<Word, false, Update::Replace>(rows, vectors, k, a, k, b, b_step, c, c_step);
}
}  // namespace
}  // namespace llmos
