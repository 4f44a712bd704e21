// How rows become int8.
#include <algorithm>
#include <limits>

#include "../int8.h"
#include "few.h"

namespace llmos {
namespace {

using U = UnitOf<int8_t>;

// What products of a row with elements that are kOffset too high are too high.
int32_t offset_of(const int8_t* row, int64_t columns) {
  constexpr int64_t kStep = kLanes * kPerUnit<U>;
  U32 sum[4] = {};
  const auto add = [&](int i, const int8_t* p) {
    sum[i] = multiply_add<U>(unit_vector<U>(p), U32{} + 0x80808080, sum[i]);
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
  return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

struct Offsets {
  static constexpr int64_t kBlock = 64;  // Rows in a task.
  const Int8Offsets& a;

  Offsets(const Int8Offsets& a, Scratch) : a(a) {}
  static int64_t scratch(const Int8Offsets&) { return 0; }

  void run(const ProductTask& task) {
    for (int64_t r = task.begin; kOffset && r < task.end; ++r)
      a.offsets[r] = offset_of(a.rows.at(r, 0), a.columns);
  }
};

template <class V>
inline auto magnitude(V v) {
  using Bits = std::conditional_t<std::is_same_v<V, F32>, U32, uint32_t>;
  return std::bit_cast<Bits>(v) & 0x7fffffff;
}

template <class T>
struct Columns {
  static constexpr int64_t kBlock = 32 * kLanes;
  const Int8Columns<T>& a;

  Columns(const Int8Columns<T>& a, Scratch) : a(a) {}
  static int64_t scratch(const Int8Columns<T>&) { return 0; }

  void run(const ProductTask& task) {
    uint32_t* keep = a.keep + task.begin;
    const int64_t count = task.end - task.begin;
    std::fill_n(keep, count, ~uint32_t(0));
    const uint32_t least = std::bit_cast<uint32_t>(a.threshold);
    for (int64_t r = 0; r < a.rows; ++r)
      sweep(count, [&](auto part, int64_t i) {
        using V = typename decltype(part)::V;
        // As bits NaN comes after infinity.
        const auto bits = magnitude(load<V>(a.input + r * a.step + task.begin + i));
        using Bits = std::remove_const_t<decltype(bits)>;
        Bits kept = load_bits<Bits>(keep + i);
        const Bits infinity = Bits{} + 0x7f800000;
        if constexpr (std::is_same_v<V, F32>)
          kept = (bits >= least) & (bits <= infinity) ? Bits{} : kept;
        else
          kept = bits >= least && bits <= infinity ? 0 : kept;
        std::memcpy(keep + i, &kept, sizeof kept);
      });
  }
};

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
    const float largest = std::bit_cast<float>(last);
    if (last >= 0x7f800000 || largest < kSmallest) {
      scale = last >= 0x7f800000 ? std::numeric_limits<float>::quiet_NaN() : 0;
      std::fill_n(to, a.columns, int8_t(0));
      return;
    }
    scale = largest / 127;
    const float inverse = 127 / largest;
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
      a.keep ? row<true>(from, to, a.scale[r]) : row<false>(from, to, a.scale[r]);
      if (kOffset && a.offsets) a.offsets[r] = offset_of(to, a.columns);
      for (int64_t i = 0; i < a.count; ++i) a.x[r * a.count + i] = load<float>(from + a.index[i]);
    }
  }
};

const BuildOf<Offsets, Int8Offsets> offset_build;
const KernelBuilds<Columns, Int8Columns> column_builds;
const KernelBuilds<Rows, Int8Rows> row_builds;

}  // namespace
}  // namespace llmos
