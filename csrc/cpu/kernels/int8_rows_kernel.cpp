// How rows become int8.
#include <algorithm>
#include <limits>

#include "../int8.h"
#include "gemv.h"

namespace llmos {
namespace {

using U = UnitOf<int8_t>;

// 128 times the sum of a row.
int32_t offset_of(const int8_t* row, int64_t columns) {
  constexpr bool kQuad = std::is_same_v<U, Quad>;
  constexpr int64_t kStep = kLanes * kPerUnit<U>;
  U32 sum[4] = {};
  const auto add = [&](int i, const int8_t* p) {
    sum[i] = multiply_add<U>(unit_vector<U>(p), U32{} + (kQuad ? 0x80808080 : 0x00010001), sum[i]);
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
  return total((sum[0] + sum[1]) + (sum[2] + sum[3])) * (kQuad ? 1 : 128);
}

struct Offsets {
  static constexpr int64_t kBlock = 64;  // Rows in a task.
  const Int8Offsets& a;

  Offsets(const Int8Offsets& a, Scratch) : a(a) {}
  static int64_t scratch(const Int8Offsets&) { return 0; }

  void run(const ProductTask& task) {
    for (int64_t r = task.begin; r < task.end; ++r)
      a.offsets[r] = offset_of(a.rows.at(r, 0), a.columns);
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
struct Rows {
  static constexpr int64_t kBlock = 4;  // Rows in a task.
  static constexpr float kSmallest = 1e-36f;
  const Int8Rows<T>& a;

  Rows(const Int8Rows<T>& a, Scratch) : a(a) {}
  static int64_t scratch(const Int8Rows<T>&) { return 0; }

  // Elements of a row, 0 in columns that are not kept.
  template <class V, bool kMasked>
  [[gnu::always_inline]] V element(const T* from, int64_t i) const {
    const V v = load<V>(from + i);
    if constexpr (!kMasked) return v;
    using Bits = std::conditional_t<std::is_same_v<V, F32>, U32, uint32_t>;
    return std::bit_cast<V>(std::bit_cast<Bits>(v) & load_bits<Bits>(a.keep + i));
  }

  // Clears keep where an element reaches the threshold: as bits NaN comes after infinity.
  void mark(const T* from) const {
    const uint32_t least = std::bit_cast<uint32_t>(a.threshold), infinity = 0x7f800000;
    const auto one = [&](int64_t i) {
      const uint32_t bits = magnitude(load<float>(from + i));
      if (bits >= least && bits <= infinity)
        __atomic_store_n(a.keep + i, uint32_t(0), __ATOMIC_RELAXED);
    };
    int64_t i = 0;
    for (; i + kLanes <= a.columns; i += kLanes)
      if (any(magnitude(load<F32>(from + i)) >= least))
        for (int64_t lane = 0; lane < kLanes; ++lane) one(i + lane);
    for (; i < a.columns; ++i) one(i);
  }

  template <bool kMasked>
  [[gnu::noinline]] void row(const T* from, int8_t* to, float& scale) {
    // As bits the largest magnitude is also what is not finite.
    U32 most[4] = {};
    uint32_t last = 0;
    sweep(a.columns, [&](auto part, int64_t i) {
      using P = decltype(part);
      const auto bits = magnitude(element<typename P::V, kMasked>(from, i));
      if constexpr (std::is_same_v<typename P::V, F32>)
        most[P::kPart] = bits > most[P::kPart] ? bits : most[P::kPart];
      else
        last = std::max(last, bits);
    });
    for (const U32& v : most)
      for (int i = 0; i < kLanes; ++i) last = std::max(last, v[i]);
    if (a.keep && !kMasked && last >= std::bit_cast<uint32_t>(a.threshold)) {
      mark(from);
      if (last < 0x7f800000) return;  // All rows come again, without the columns marked.
    }
    const float largest = std::bit_cast<float>(last);
    if (last >= 0x7f800000 || largest < kSmallest) {
      scale = last >= 0x7f800000 ? std::numeric_limits<float>::quiet_NaN() : 0;
      std::fill_n(to, a.columns, int8_t(0));
      return;
    }
    scale = largest / a.levels;
    const float inverse = a.levels / largest;
    sweep(a.columns, [&](auto part, int64_t i) {
      using V = typename decltype(part)::V;
      // Rounded to a whole number, which the low bits are in two's complement.
      const V whole = element<V, kMasked>(from, i) * inverse + 0x1.8p23f;
      if constexpr (std::is_same_v<V, F32>) {
#if defined(__AVX512F__)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm512_cvtepi32_epi8(std::bit_cast<__m512i>(whole)));
#else
        for (int j = 0; j < kLanes; ++j) to[i + j] = int8_t(std::bit_cast<U32>(whole)[j]);
#endif
      } else {
        to[i] = int8_t(std::bit_cast<uint32_t>(whole));
      }
    });
  }

  void run(const ProductTask& task) {
    for (int64_t r = task.begin; r < task.end; ++r) {
      const T* from = a.input + r * a.step;
      int8_t* to = a.rows + r * a.columns;
      a.count ? row<true>(from, to, a.scale[r]) : row<false>(from, to, a.scale[r]);
      if (kOffset && a.offsets) a.offsets[r] = offset_of(to, a.columns);
      for (int64_t i = 0; i < a.count; ++i) a.x[r * a.count + i] = load<float>(from + a.index[i]);
    }
  }
};

const BuildOf<Offsets, Int8Offsets> offset_build;
const KernelBuilds<Rows, Int8Rows, true> row_builds;

}  // namespace
}  // namespace llmos
