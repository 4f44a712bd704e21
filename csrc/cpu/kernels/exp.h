// Vectorised exponentials, tanh and the maximum, as softmax needs them.
#pragma once

#include "vec.h"

namespace llmos {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// Return the maximum; b if a or b is NaN.
inline F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return F32(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return F32(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}

// A power of two, whose exponent is the whole number next to t * factor.
struct PowerOfTwo {
  F32 exponent;
#if !defined(__AVX512F__)
  // Adding 1.5 * 2^23 rounds to a whole number, whose lowest bits become those of the sum; with 127
  // more they are the exponent bits of a float.
  static constexpr float kBias = 0x1.8p23f + 127;
  F32 biased;
#endif

  [[gnu::always_inline]] PowerOfTwo(F32 t, float factor) {
#if defined(__AVX512F__)
    exponent = F32(_mm512_roundscale_ps(__m512(t * factor), _MM_FROUND_TO_NEAREST_INT));
#else
    biased = fma(t, F32{} + factor, F32{} + kBias);
    exponent = biased - kBias;
#endif
  }

  // Return p times the power. Below 2^-126 it is 0, whatever p is: on some CPUs subnormal results
  // take a hundred times as long. NaN gives NaN.
  [[gnu::always_inline]] F32 times(F32 p) const {
#if defined(__AVX512F__)
    const __mmask16 normal =
        _mm512_cmp_ps_mask(__m512(exponent), _mm512_set1_ps(-126), _CMP_NLT_UQ);  // Or NaN.
    return F32(_mm512_maskz_scalef_ps(normal, __m512(p), __m512(exponent)));
#else
    const F32 power = std::bit_cast<F32>(std::bit_cast<U32>(biased) << 23);
    return exponent < -126 ? F32{} : p * power;
#endif
  }
};

// exp_negative returns e^t to the last digit of a float, exp2_negative 2^t to 1e-7, for t <= 0 or
// slightly above. -infinity gives 0, NaN stays NaN.
[[gnu::always_inline]] inline F32 exp_negative(F32 t) {
  const PowerOfTwo power(t, kLog2E);
  F32 f = fma(power.exponent, F32{} - 0x1.62e4p-1f, t);
  f = fma(power.exponent, F32{} - 0x1.7f7d1cp-20f, f);
  F32 p = fma(f, F32{} + 1.381446674e-3f, F32{} + 8.368780429e-3f);
  p = fma(p, f, F32{} + 4.166839422e-2f);
  p = fma(p, f, F32{} + 1.666652011e-1f);
  p = fma(p, f, F32{} + 4.999999341e-1f);
  p = fma(p, f, F32{} + 1);
  return power.times(fma(p, f, F32{} + 1));
}

[[gnu::always_inline]] inline F32 exp2_negative(F32 t) {
  const PowerOfTwo power(t, 1);
  const F32 f = t - power.exponent;
  F32 p = fma(f, F32{} + 1.326472690e-3f, F32{} + 9.671512661e-3f);
  p = fma(p, f, F32{} + 5.550733744e-2f);
  p = fma(p, f, F32{} + 2.402224208e-1f);
  p = fma(p, f, F32{} + 6.931469776e-1f);
  return power.times(fma(p, f, F32{} + 1));
}

// Return tanh(x) to 2e-7 of itself, also where it is next to 0. Infinity gives 1, NaN stays NaN.
[[gnu::always_inline]] inline F32 tanh(F32 x) {
  const U32 sign = std::bit_cast<U32>(x) & 0x80000000u;
  const F32 magnitude = std::bit_cast<F32>(std::bit_cast<U32>(x) ^ sign), square = x * x;
  F32 p = fma(square, F32{} - 5.70498872745e-3f, F32{} + 2.06390887954e-2f);
  p = fma(p, square, F32{} - 5.37397155531e-2f);
  p = fma(p, square, F32{} + 1.33314422036e-1f);
  p = fma(p, square, F32{} - 3.33332819422e-1f);
  const F32 small = fma(p * square, magnitude, magnitude);
  const F32 e = exp_negative(magnitude * -2);
  const F32 t = magnitude < 0.625f ? small : (1 - e) / (1 + e);
  return std::bit_cast<F32>(std::bit_cast<U32>(t) | sign);
}

}  // namespace
}  // namespace llmos
