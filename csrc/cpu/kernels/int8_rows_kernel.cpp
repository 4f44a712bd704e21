// Quantization of rows to int8, and the zero-point corrections of int8 rows.
#include <algorithm>
#include <limits>

#include "../int8.h"
#include "gemv.h"

namespace llmos {
namespace {

using U = WordOf<int8_t>;

// Return 128 * sum(row).
int32_t zero_point_correction(const int8_t* row, int64_t columns) {
  constexpr bool kIsVnni = std::is_same_v<U, Int8x4>;
  constexpr int64_t kStep = kLanes * kPerWord<U>;
  U32 sum[4] = {};
  const auto add = [&](int i, const int8_t* p) {
    sum[i] = multiply_add<U>(load_words<U>(p), U32{} + (kIsVnni ? 0x80808080 : 0x00010001), sum[i]);
  };
  int64_t k = 0;
  for (; k + 4 * kStep <= columns; k += 4 * kStep)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) add(i, row + k + i * kStep);
  for (; k < columns; k += kStep) {
    int8_t tail[kStep] = {};
    std::memcpy(tail, row + k, std::min(kStep, columns - k));
    add(0, tail);
  }
  return total((sum[0] + sum[1]) + (sum[2] + sum[3])) * (kIsVnni ? 1 : 128);
}

struct Int8ZeroPointKernel {
  static constexpr int64_t kBlock = 64;  // Rows in a task.
  const Int8ZeroPointArgs& a;

  Int8ZeroPointKernel(const Int8ZeroPointArgs& a, Scratch) : a(a) {}
  static int64_t scratch(const Int8ZeroPointArgs&) { return 0; }

  void run(const GemmTask& task) {
    for (int64_t r = task.begin; r < task.end; ++r)
      a.row_corrections[r] = zero_point_correction(a.rows.at(r, 0), a.columns);
  }
};

template <class V>
inline auto magnitude(V v) {
  using Bits = std::conditional_t<std::is_same_v<V, F32>, U32, uint32_t>;
  return std::bit_cast<Bits>(v) & 0x7fffffff;
}

inline bool any(U32 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask));
#elif defined(__AVX2__)
  return !_mm256_testz_si256(__m256i(mask), __m256i(mask));
#else
  return mask[0] | mask[1] | mask[2] | mask[3];
#endif
}

template <class T>
struct Int8QuantizeKernel {
  static constexpr int64_t kBlock = 4;  // Rows in a task.
  static constexpr float kMinMagnitude = 1e-36f;
  const Int8QuantizeArgs<T>& a;

  Int8QuantizeKernel(const Int8QuantizeArgs<T>& a, Scratch) : a(a) {}
  static int64_t scratch(const Int8QuantizeArgs<T>&) { return 0; }

  // Return elements of a row, with 0 in outlier columns (column_mask is 0 there).
  template <class V, bool kMasked>
  [[gnu::always_inline]] V element(const T* from, int64_t i) const {
    const V v = load<V>(from + i);
    if constexpr (!kMasked) return v;
    using Bits = std::conditional_t<std::is_same_v<V, F32>, U32, uint32_t>;
    return std::bit_cast<V>(std::bit_cast<Bits>(v) & load_bits<Bits>(a.column_mask + i));
  }

  // Clear column_mask where an element reaches the threshold. NaN is left out: as an integer it is
  // above infinity.
  void mark_outliers(const T* from) const {
    const uint32_t threshold_bits = std::bit_cast<uint32_t>(a.threshold), infinity = 0x7f800000;
    const auto clear_if_outlier = [&](int64_t i) {
      const uint32_t bits = magnitude(load<float>(from + i));
      if (bits >= threshold_bits && bits <= infinity)
        __atomic_store_n(a.column_mask + i, uint32_t(0), __ATOMIC_RELAXED);
    };
    int64_t i = 0;
    for (; i + kLanes <= a.columns; i += kLanes)
      if (any(magnitude(load<F32>(from + i)) >= threshold_bits))
        for (int64_t lane = 0; lane < kLanes; ++lane) clear_if_outlier(i + lane);
    for (; i < a.columns; ++i) clear_if_outlier(i);
  }

  template <bool kMasked>
  [[gnu::noinline]] void row(const T* from, int8_t* to, float& scale) {
    // The largest magnitude, compared as integers, so that infinity and NaN count as largest.
    U32 max_bits[4] = {};
    uint32_t largest_bits = 0;
    sweep(a.columns, [&](auto part, int64_t i) {
      using P = decltype(part);
      const auto bits = magnitude(element<typename P::V, kMasked>(from, i));
      if constexpr (std::is_same_v<typename P::V, F32>)
        max_bits[P::kPart] = bits > max_bits[P::kPart] ? bits : max_bits[P::kPart];
      else
        largest_bits = std::max(largest_bits, bits);
    });
    for (const U32& v : max_bits)
      for (int i = 0; i < kLanes; ++i) largest_bits = std::max(largest_bits, v[i]);
    if (a.column_mask && !kMasked && largest_bits >= std::bit_cast<uint32_t>(a.threshold)) {
      mark_outliers(from);
      // The second pass quantizes all rows again, without the marked columns.
      if (largest_bits < 0x7f800000) return;
    }
    const float largest = std::bit_cast<float>(largest_bits);
    if (largest_bits >= 0x7f800000 || largest < kMinMagnitude) {
      scale = largest_bits >= 0x7f800000 ? std::numeric_limits<float>::quiet_NaN() : 0;
      std::fill_n(to, a.columns, int8_t(0));
      return;
    }
    scale = largest / a.max_level;
    const float inverse = a.max_level / largest;
    sweep(a.columns, [&](auto part, int64_t i) {
      using V = typename decltype(part)::V;
      // Adding 1.5 * 2^23 rounds to an integer, whose two's complement is in the low bits.
      const V whole = element<V, kMasked>(from, i) * inverse + 0x1.8p23f;
      if constexpr (std::is_same_v<V, F32>) {
        store_low_bytes(to + i, std::bit_cast<U32>(whole));
      } else {
        to[i] = int8_t(std::bit_cast<uint32_t>(whole));
      }
    });
  }

  void run(const GemmTask& task) {
    for (int64_t r = task.begin; r < task.end; ++r) {
      const T* from = a.input + r * a.row_stride;
      int8_t* to = a.quantized + r * a.columns;
      a.outlier_count ? row<true>(from, to, a.scale[r]) : row<false>(from, to, a.scale[r]);
      if (kZeroPoint && a.row_corrections)
        a.row_corrections[r] = zero_point_correction(to, a.columns);
      for (int64_t i = 0; i < a.outlier_count; ++i)
        a.outlier_values[r * a.outlier_count + i] = load<float>(from + a.outlier_index[i]);
    }
  }
};

const RegisterTaskKernel<Int8ZeroPointKernel, Int8ZeroPointArgs> register_zero_point;
const RegisterForDtypes<Int8QuantizeKernel, Int8QuantizeArgs, true> register_quantize;

}  // namespace
}  // namespace llmos
