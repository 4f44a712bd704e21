// Philox4x32-7 random numbers (Salmon et al., SC 2011) for dropout, vectorised over consecutive
// counters. The bits equal those of the definition in llmos_kernels/ops/_dropout.py.
#pragma once

#include "../dropout.h"
#include "vec.h"

namespace llmos {
namespace {

// One counter in each 64-bit lane, a word of it in the lower half; the upper half may hold
// anything.
using Lanes = uint64_t __attribute__((vector_size(4 * kLanes)));

// Return the products of the lower halves of a with m: 64 bits.
inline Lanes multiply_wide(Lanes a, uint32_t m) {
#if defined(__AVX512F__)
  return Lanes(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return Lanes(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(m)));
#else
  return (a & 0xffffffff) * uint64_t(m);
#endif
}

// Replace the four words of each counter by random words. What is not unrolled stays in memory.
[[gnu::always_inline]] inline void philox_rounds(const Dropout& dropout, Lanes (&c)[4]) {
#pragma GCC unroll 7
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Lanes product0 = multiply_wide(c[0], 0xD2511F53),
                product1 = multiply_wide(c[2], 0xCD9E8D57);
    c[0] = product1 >> 32 ^ c[1] ^ dropout.keys[round][0];
    c[2] = product0 >> 32 ^ c[3] ^ dropout.keys[round][1];
    c[1] = product1;
    c[3] = product0;
  }
}

// Replace the four counters c of each 32-bit lane by four random words.
[[gnu::always_inline]] inline void philox(const Dropout& dropout, U32 (&c)[4]) {
  Lanes even[4], odd[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    even[i] = Lanes(c[i]);
    odd[i] = Lanes(c[i]) >> 32;
  }
  philox_rounds(dropout, even);
  philox_rounds(dropout, odd);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) c[i] = U32((even[i] & 0xffffffff) | odd[i] << 32);
}

// Return 0 or the scale of elements that are not dropped, for each random word.
inline F32 dropout_factors(const Dropout& dropout, U32 word) {
  return word < dropout.threshold ? F32{} : F32{} + dropout.scale;
}

// Write the dropout factors of columns [begin, begin + 4 * kLanes) of a row; begin is a multiple
// of 4.
inline void dropout_block(const Dropout& dropout, int64_t row, int64_t begin, float* factors) {
  alignas(64) static constexpr uint32_t numbers[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                       8, 9, 10, 11, 12, 13, 14, 15};
  U32 c[4] = {load_bits<U32>(numbers) + uint32_t(begin / 4), U32{} + uint32_t(row),
              U32{} + uint32_t(uint64_t(row) >> 32), U32{} + uint32_t(dropout.offset)};
  philox(dropout, c);
  U32 even[2], odd[2], word[4];
  zip(c[0], c[2], even[0], even[1]);
  zip(c[1], c[3], odd[0], odd[1]);
  zip(even[0], odd[0], word[0], word[1]);
  zip(even[1], odd[1], word[2], word[3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) store(factors + i * kLanes, dropout_factors(dropout, word[i]));
}

// Call body(begin, count, factors) for consecutive pieces of a row of d columns.
template <class Body>
inline void for_each_dropout_block(const Dropout& dropout, int64_t row, int64_t d, Body body) {
  constexpr int64_t width = 4 * kLanes;
  float factors[width];
  for (int64_t begin = 0; begin < d; begin += width) {
    dropout_block(dropout, row, begin, factors);
    body(begin, d - begin < width ? d - begin : width, factors);
  }
}

}  // namespace
}  // namespace llmos
