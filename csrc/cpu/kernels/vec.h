// Vectors of the width that the ISA has, and the loops over rows that use them.
//
// Everything here has internal linkage: the file is compiled once per ISA, and the linker must
// never merge the code of two ISAs.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../isa_table.h"

namespace llmos {
namespace {

template <class T>
constexpr bool kIsaBenefits = isa_benefits<T>(LLMOS_ISA);

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using F32 = float __attribute__((vector_size(4 * kLanes)));
using U32 = uint32_t __attribute__((vector_size(4 * kLanes)));
using U16 = uint16_t __attribute__((vector_size(2 * kLanes)));
using I32 = int32_t __attribute__((vector_size(4 * kLanes)));
using I8 = int8_t __attribute__((vector_size(2 * kLanes)));  // Twice as many lanes.
using I16 = int16_t __attribute__((vector_size(4 * kLanes)));

template <class V>
inline V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// gcc splits both conversions into halves; AVX-512 and AVX2 have one instruction for each.
inline U32 widen(U16 v) {
#if defined(__AVX512F__)
  return U32(_mm512_cvtepu16_epi32(__m256i(v)));
#elif defined(__AVX2__)
  return U32(_mm256_cvtepu16_epi32(__m128i(v)));
#else
  return __builtin_convertvector(v, U32);
#endif
}

inline U16 narrow(U32 v) {
#if defined(__AVX512F__)
  return U16(_mm512_cvtepi32_epi16(__m512i(v)));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128(__m256i(v)),
                high = _mm256_extracti128_si256(__m256i(v), 1);
  return U16(_mm_packus_epi32(low, high));
#else
  return __builtin_convertvector(v, U16);
#endif
}

// Return the sum of all lanes, always in the same order: halves, quarters, ... pairs.
inline float horizontal_sum(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(v));
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// Return a * b + c, rounded once if the ISA has FMA. The compiler does not contract expressions
// itself, so that the bits of a row do not depend on the loop that handles it.
inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return F32(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__)
  return F32(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

inline float fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = uint32_t(bits & 0x7fff) << 13;
  // As a float its exponent is 112 too small; the product also normalizes subnormals.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000;
  return std::bit_cast<float>(sign | (magnitude >= 0x0f800000 ? special : finite));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Adding 0.5 rounds to a multiple of the smallest subnormal, 2^-24.
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

// Return the upper half of a float, rounded to nearest even. NaN stays a quiet NaN.
template <class U>
inline U bf16_bits(U bits) {
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
}

// load<F32>(p) takes kLanes elements from p, load<float>(p) takes one.
template <class V>
inline V load(const float* p) {
  return load_bits<V>(p);
}

template <class V>
inline V load(const bf16* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return std::bit_cast<float>(uint32_t(p->bits) << 16);
  } else {
    return std::bit_cast<F32>(widen(load_bits<U16>(p)) << 16);
  }
}

template <class V>
inline V load(const f16* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return half_to_float(p->bits);
  } else {
#if defined(__AVX512F__)
    return F32(_mm512_cvtph_ps(load_bits<__m256i>(p)));
#elif defined(__AVX2__)
    return F32(_mm256_cvtph_ps(load_bits<__m128i>(p)));
#else
    F32 v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i].bits);
    return v;
#endif
  }
}

template <class V>
inline V load(const int8_t* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return float(*p);
  } else {
#if defined(__AVX512F__)
    return F32(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bits<__m128i>(p))));
#elif defined(__AVX2__)
    return F32(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
    F32 v;
    for (int i = 0; i < kLanes; ++i) v[i] = float(p[i]);
    return v;
#endif
  }
}

template <class V>
inline void store(float* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline void store(bf16* p, float v) { p->bits = uint16_t(bf16_bits(std::bit_cast<uint32_t>(v))); }

inline void store(bf16* p, F32 v) {
#if defined(__AVX512BF16__)
  // The instruction treats subnormals as 0.
  constexpr int kSubnormal = 0x20;
  if (!_mm512_fpclass_ps_mask(__m512(v), kSubnormal)) [[likely]] {
    const __m256bh bits = _mm512_cvtneps_pbh(__m512(v));
    std::memcpy(p, &bits, sizeof bits);
    return;
  }
#endif
  const U16 bits = narrow(bf16_bits(std::bit_cast<U32>(v)));
  std::memcpy(p, &bits, sizeof bits);
}

inline void store(f16* p, float v) { p->bits = float_to_half(v); }

inline void store(f16* p, F32 v) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &bits, sizeof bits);
#elif defined(__AVX2__)
  const __m128i bits = _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &bits, sizeof bits);
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// Store the lowest byte of each lane.
inline void store_low_bytes(int8_t* p, U32 v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(v)));
#elif defined(__AVX2__)
  const __m256i every_fourth = _mm256_set1_epi32(0x0c080400);
  const __m256i bytes = _mm256_shuffle_epi8(__m256i(v), every_fourth);
  _mm_storel_epi64(
      reinterpret_cast<__m128i*>(p),
      _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(v[i]);
#endif
}

// Store v, and returns it rounded to the type it is stored as.
template <class V>
inline V store_rounded(float* p, V v) {
  store(p, v);
  return v;
}

template <class T, class V>
inline V store_rounded(T* p, V v) {
  store(p, v);
  return load<V>(p);
}

// Load the first n lanes; the others are 0. Setting lanes one by one would keep the whole vector
// in memory, even if all lanes are wanted.
template <class V, class T>
[[gnu::always_inline]] inline V load_lanes(const T* p, int64_t n) {
  constexpr int64_t count = sizeof(V) / 4;
  if (n >= count) [[likely]] {
    if constexpr (std::is_same_v<V, U32>)
      return load_bits<V>(p);
    else
      return load<V>(p);
  }
  T lanes[count] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load_lanes<V>(lanes, count);
}

template <class T>
[[gnu::always_inline]] inline void store_lanes(T* p, F32 v, int64_t n) {
  if (n >= kLanes) [[likely]]
    return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

template <class V, size_t... kLane>
inline void zip(V a, V b, V& first, V& second, std::index_sequence<kLane...>) {
  constexpr int n = kLanes;
  first = __builtin_shufflevector(a, b, int(kLane / 2 + kLane % 2 * n)...);
  second = __builtin_shufflevector(a, b, int(n / 2 + kLane / 2 + kLane % 2 * n)...);
}

// Interleave the lanes of a and b: a0 b0 a1 b1 ...
template <class V>
inline void zip(V a, V b, V& first, V& second) {
  zip(a, b, first, second, std::make_index_sequence<kLanes>{});
}

// The argument of a loop body: the type to load, and the partial sum (of four) that it adds to.
template <class V_, int kPart_>
struct Part {
  using V = V_;
  static constexpr int kPart = kPart_;
};

// Call body(Part, i) over [0, d): four vectors at a time, then one, then single elements.
template <class Body>
[[gnu::always_inline]] inline void sweep(int64_t d, Body body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    body(Part<F32, 0>{}, i);
    body(Part<F32, 1>{}, i + kLanes);
    body(Part<F32, 2>{}, i + 2 * kLanes);
    body(Part<F32, 3>{}, i + 3 * kLanes);
  }
  for (; i + kLanes <= d; i += kLanes) body(Part<F32, 0>{}, i);
  for (; i < d; ++i) body(Part<float, 0>{}, i);
}

// Elements after which a sum starts new partial sums.
constexpr int64_t kFoldEvery = 128 * kLanes;

// A sum over a sweep. The order of additions is always the same, whatever the row or thread.
struct Sum {
  F32 part[4] = {};
  float tail = 0, before = 0;

  template <int kPart>
  [[gnu::always_inline]] F32& at(Part<F32, kPart>) {
    return part[kPart];
  }
  [[gnu::always_inline]] float& at(Part<float, 0>) { return tail; }

  template <class P>
  [[gnu::always_inline]] void add(P p, typename P::V v) {
    at(p) += v;
  }
  template <class P>
  [[gnu::always_inline]] void add_product(P p, typename P::V a, typename P::V b) {
    at(p) = fma(a, b, at(p));
  }

  float total() const {
    return before + (horizontal_sum((part[0] + part[1]) + (part[2] + part[3])) + tail);
  }

  // Start new partial sums: one long float32 sum would be less precise.
  void fold() { *this = {.before = total()}; }
};

// A sweep that adds to sums.
template <class Body, class... Sums>
[[gnu::always_inline]] inline void sweep_sums(int64_t d, Body body, Sums&... sums) {
  if (d <= kFoldEvery) return sweep(d, body);
  for (int64_t begin = 0; begin < d; begin += kFoldEvery) {
    sweep(d - begin < kFoldEvery ? d - begin : kFoldEvery,
          [&](auto part, int64_t i) { body(part, begin + i); });
    (sums.fold(), ...);
  }
}

}  // namespace
}  // namespace llmos
