// The VNNI layout of GEMM operands, and the functions that pack matrices into it.
//
// A word is 32 bits of consecutive elements of the inner dimension: what one lane of a dot-product
// instruction multiplies. The ISA decides how many elements a word holds:
//
//     float32, float16   one float
//     bfloat16           two bfloat16 with vdpbf16ps or AMX, else one float
//     int8               four int8 with vpdpbusd or AMX, else two int16; sums are int32.
//                        GEMMs read weights of four int8 on every ISA (int8_product.h)
//
// Comments give layouts as [word][row] or [row][word], outer dimension first.
#pragma once

#include <algorithm>

#include "vec.h"

namespace llmos {
namespace {

struct Bf16x2 {
  bf16 first, second;
};

// vpdpbusd takes one of its operands as uint8: int8 + kZeroPoint.
struct Int8x4 {
  int8_t elements[4];
};
struct Int16x2 {
  int16_t first, second;
};

#if defined(__AVX512BF16__)
using FloatWord = Bf16x2;
#else
using FloatWord = float;
#endif
#if defined(__AVX512VNNI__)
using Int8Word = Int8x4;
#else
using Int8Word = Int16x2;
#endif
template <class T>
using WordOf = std::conditional_t<std::is_same_v<T, int8_t>, Int8Word,
                                  std::conditional_t<std::is_same_v<T, bf16>, FloatWord, float>>;

// The number of elements in a word, and the type that one element is stored as.
template <class Word>
constexpr int kPerWord = std::is_same_v<Word, Int8x4>  ? 4
                         : std::is_same_v<Word, float> ? 1
                                                       : 2;
template <class Word>
using Element = std::conditional_t<
    std::is_same_v<Word, Int8x4>, int8_t,
    std::conditional_t<std::is_same_v<Word, Int16x2>, int16_t,
                       std::conditional_t<std::is_same_v<Word, Bf16x2>, bf16, float>>>;

template <class Word>
constexpr bool kIsInt = std::is_same_v<Word, Int8x4> || std::is_same_v<Word, Int16x2>;
constexpr int32_t kZeroPoint = std::is_same_v<Int8Word, Int8x4> ? 128 : 0;

// The type in which products are summed, and a vector of it.
template <class Word>
using AccumulatorOf = std::conditional_t<kIsInt<Word>, int32_t, float>;
template <class Word>
using AccumulatorVectorOf = std::conditional_t<kIsInt<Word>, U32, F32>;

template <class Word>
constexpr int64_t words(int64_t elements) {
  return (elements + kPerWord<Word> - 1) / kPerWord<Word>;
}

constexpr int64_t to_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// How a GEMM updates c with the product: c = a b, c += a b, or c = alpha[row] c + a b.
enum class Update { Replace, Add, ScaleAdd };

// Pack a row of n elements of T, and fills it with zeros up to `padded` elements.
template <class Word, class T>
[[gnu::always_inline]] inline void pack_row(const T* from, int64_t n, int64_t padded, Word* to_) {
  auto* to = reinterpret_cast<Element<Word>*>(to_);
  if constexpr (std::is_same_v<Element<Word>, T>) {
    if (n) std::memcpy(to, from, n * sizeof(T));
  } else if constexpr (kIsInt<Word>) {
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

// Add kZeroPoint to each int8 element by flipping its highest bit. n is a multiple of kLanes.
template <class Word>
inline void add_zero_point(Word* packed, int64_t n) {
  for (int64_t i = 0; std::is_same_v<Word, Int8x4> && i < n; i += kLanes) {
    const U32 v = load_bits<U32>(packed + i) ^ 0x80808080;
    std::memcpy(packed + i, &v, sizeof v);
  }
}

// Transpose a kLanes x kLanes matrix: lane j of vector i becomes lane i of vector j.
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

// Transpose kLanes packed rows of `count` words to [word][row].
template <class Word>
[[gnu::noinline]] void transpose_rows(const Word* const* rows, int64_t count, Word* to,
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

// Transpose [word][row] to [row][word]. Reads each row up to whole vectors, and to_step must have
// room for whole vectors of words.
template <class Word>
void transpose_words(int64_t rows, int64_t k, const Word* from, int64_t step, Word* to,
                     int64_t to_step) {
  for (int64_t i = 0; i < k; i += kLanes) {
    const Word* lines[kLanes];
    for (int64_t n = 0; n < kLanes; ++n) lines[n] = from + std::min(i + n, k - 1) * step;
    transpose_rows(lines, to_vectors(rows), to + i, to_step);
  }
}

// Pack two rows a, b of n elements whose inner dimension runs over the rows: as bfloat16 pairs (a0
// b0) (a1 b1) ..., or, where a word is one element, as row a and row b, to_step words apart.
template <class Word, class T>
[[gnu::always_inline]] inline void pack_row_pair(const T* a, const T* b, int64_t n, int64_t padded,
                                                 Word* to, int64_t to_step) {
  if constexpr (std::is_same_v<Word, Bf16x2>) {
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

// Store kLanes words of two bfloat16: lane i of `first` and lane i of `second`.
inline void store_bf16_pairs(float* to, F32 first, F32 second) {
#if defined(__AVX512BF16__)
  const __m512i both = __m512i(_mm512_cvtne2ps_pbh(__m512(second), __m512(first)));
  using U16x32 = uint16_t __attribute__((vector_size(64)));
  const U16x32 alternating = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_permutexvar_epi16(__m512i(alternating), both);
  std::memcpy(to, &pairs, sizeof pairs);
#endif
}
}  // namespace
}  // namespace llmos
