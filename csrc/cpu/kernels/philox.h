// Philox4x32-10 random numbers (Salmon et al., SC 2011) for dropout, vectorised over consecutive
// counters. The bits equal those of the definition in llmos_kernels/ops/_dropout.py.
#pragma once

#include "../dropout.h"
#include "vec.h"

namespace llmos {
namespace {

// Compute the high and low 32 bits of a * m in each lane.
inline void multiply_wide(U32 a, uint32_t m, U32& high, U32& low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(int(m)), even = _mm512_mul_epu32(__m512i(a), factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(__m512i(a), 32), factor);
  high = U32(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
  low = U32(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(int(m)), even = _mm256_mul_epu32(__m256i(a), factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(__m256i(a), 32), factor);
  high = U32(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  low = U32(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  const U64 wide = __builtin_convertvector(a, U64) * uint64_t(m);
  high = __builtin_convertvector(wide >> 32, U32);
  low = __builtin_convertvector(wide, U32);
#endif
}

// Replace the four counters c of each lane by four random words.
inline void philox(const Dropout& dropout, U32 c[4]) {
  uint32_t key0 = uint32_t(dropout.seed), key1 = uint32_t(dropout.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U32 high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57, high1, low1);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// Return 0 or the scale of elements that are not dropped, for each random word.
inline F32 dropout_factors(const Dropout& dropout, U32 word) {
  return word < dropout.threshold ? F32{} : F32{} + dropout.scale;
}

// Write the dropout factors of columns [begin, begin + 4 * kLanes) of a row; begin is a multiple
// of 4.
inline void dropout_block(const Dropout& dropout, int64_t row, int64_t begin, float* factors) {
  uint32_t counters[kLanes];
  for (int i = 0; i < kLanes; ++i) counters[i] = uint32_t(begin / 4 + i);
  U32 c[4] = {load_bits<U32>(counters), U32{} + uint32_t(row),
              U32{} + uint32_t(uint64_t(row) >> 32), U32{} + uint32_t(dropout.offset)};
  philox(dropout, c);
  U32 even[2], odd[2], word[4];
  zip(c[0], c[2], even[0], even[1]);
  zip(c[1], c[3], odd[0], odd[1]);
  zip(even[0], odd[0], word[0], word[1]);
  zip(even[1], odd[1], word[2], word[3]);
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
