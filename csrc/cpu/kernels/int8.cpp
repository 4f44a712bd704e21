#include "../int8.h"

#include <algorithm>
#include <limits>

#include "panel_forward.h"

namespace llmos {
namespace {

using U = UnitOf<int8_t>;
using I32 = int32_t __attribute__((vector_size(sizeof(U32))));

// Adds up the lanes.
inline int32_t total(U32 v) {
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return int32_t(sum);
}

// z without its bias, of sums [row][step] in memory.
template <class T>
struct ScaledSums {
  const Int8Product<T>& a;
  int64_t row, column;  // The first ones.
  const int32_t* sums;
  int64_t step;

  [[gnu::always_inline]] F32 operator()(int64_t r, int64_t j, int64_t n) const {
    U32 sum = load_bits<U32>(sums + r * step + j);
    if (kOffset && a.offsets) {
      if (a.turned)
        sum -= load_lanes<U32>(a.offsets + column + j, n);
      else
        sum -= uint32_t(a.offsets[row + r]);
    }
    const F32 scale = load_lanes<F32>(a.weight_scale + column + j, n);
    return __builtin_convertvector(I32(sum), F32) * a.input_scale[row + r] * scale;
  }
};

template <class T>
using Product = PanelForward<int8_t, Int8Product<T>, ScaledSums<T>>;

// A vector of units from int8 in memory.
inline U32 vector(const int8_t* p) {
  if constexpr (std::is_same_v<U, Quad>) {
    return load_bits<U32>(p);
  } else {
    using I8 = int8_t __attribute__((vector_size(2 * kLanes)));
    using I16 = int16_t __attribute__((vector_size(4 * kLanes)));
    return std::bit_cast<U32>(__builtin_convertvector(load_bits<I8>(p), I16));
  }
}

constexpr int64_t kStep = kLanes * kPerUnit<U>;  // Elements in a vector of units.

// Rows of the weight are read once, where they lie.
template <class T>
struct Few {
  static constexpr int64_t kBlock = 16 * kLanes;  // Columns of out in a task.
  const Int8Few<T>& a;
  const int64_t whole;  // Elements of a row in whole vectors.
  U* x;                 // [row][unit], with the offset, up to a whole vector.
  int32_t* sums;        // [row][kBlock]

  Few(const Int8Few<T>& a, Scratch scratch)
      : a(a),
        whole(a.inner / kStep * kStep),
        x(scratch.take<U>(kFewRows * width(a))),
        sums(scratch.take<int32_t>(kFewRows * kBlock)) {
    for (int64_t r = 0; r < a.rows; ++r) {
      U* to = x + r * width(a);
      pack_row(a.input.at(r, 0), a.inner, width(a) * kPerUnit<U>, to);
      if constexpr (std::is_same_v<U, Quad>) add_offset(to, width(a));
    }
  }
  static int64_t width(const Int8Few<T>& a) { return to_vectors(units<U>(a.inner)); }
  static int64_t scratch(const Int8Few<T>& a) {
    return Scratch::size<U>(kFewRows * width(a)) + Scratch::size<int32_t>(kFewRows * kBlock);
  }

  // Products of kM rows of x and kN rows of the weight from `first` on.
  template <int kM, int kN>
  [[gnu::noinline]] void columns(int64_t first, int32_t* to) {
    const int8_t* w[kN];
    U32 sum[kM][kN] = {}, offset[kN] = {};
    for (int n = 0; n < kN; ++n) w[n] = a.weight.at(first + n, 0);
    const int64_t step = width(a);
    const auto add = [&](int64_t k, auto load) {
      U32 right[kM];
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) right[m] = load_bits<U32>(x + m * step + k / kPerUnit<U>);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        const U32 left = load(w[n] + k);
#pragma GCC unroll 4
        for (int m = 0; m < kM; ++m) sum[m][n] = multiply_add<U>(left, right[m], sum[m][n]);
        if (kOffset) offset[n] = multiply_add<U>(left, U32{} + 0x80808080, offset[n]);
      }
    };
    for (int64_t k = 0; k < whole; k += kStep) add(k, &vector);
    if (whole < a.inner)
      add(whole, [&](const int8_t* p) {
        int8_t tail[kStep] = {};
        std::memcpy(tail, p, a.inner - whole);
        return vector(tail);
      });
    for (int n = 0; n < kN; ++n)
      for (int m = 0; m < kM; ++m) to[m * kBlock + n] = total(sum[m][n] - offset[n]);
  }

  template <int kM>
  void run_rows(int64_t begin, int64_t end) {
    int64_t at = begin;
    constexpr int kN = kM > 2 && kLanes < 16 ? 2 : 4;
    for (; at + kN <= end; at += kN) columns<kM, kN>(at, sums + at - begin);
    for (; at < end; ++at) columns<kM, 1>(at, sums + at - begin);
  }

  void run(const ProductTask& task) {
    const int64_t begin = task.begin, count = task.end - begin;
    switch (a.rows) {
      case 1:
        run_rows<1>(begin, task.end);
        break;
      case 2:
        run_rows<2>(begin, task.end);
        break;
      case 3:
        run_rows<3>(begin, task.end);
        break;
      default:
        run_rows<4>(begin, task.end);
    }
    with_activation(a.epilogue.activation, [&](auto activation) {
      finish<activation>(a, 0, a.rows, begin, count, ScaledSums<T>{a, 0, begin, sums, kBlock});
    });
  }
};

struct Offsets {
  static constexpr int64_t kBlock = 256;  // Rows in a task.
  const Int8Offsets& a;

  Offsets(const Int8Offsets& a, Scratch) : a(a) {}
  static int64_t scratch(const Int8Offsets&) { return 0; }

  void run(const ProductTask& task) {
    for (int64_t row = task.begin; kOffset && row < task.end; ++row) {
      const int8_t* w = a.left.at(row, 0);
      U32 sum[4] = {};
      const auto add = [&](int i, U32 left) {
        sum[i] = multiply_add<U>(left, U32{} + 0x80808080, sum[i]);
      };
      int64_t k = 0;
      for (; k + 4 * kStep <= a.inner; k += 4 * kStep)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add(i, vector(w + k + i * kStep));
      for (; k < a.inner; k += kStep) {
        int8_t tail[kStep] = {};
        std::memcpy(tail, w + k, std::min(kStep, a.inner - k));
        add(0, vector(tail));
      }
      a.offsets[row] = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }
};

template <class T>
struct Rows {
  static constexpr int64_t kBlock = 4;  // Rows in a task.
  static constexpr float kSmallest = 1e-36f;
  const Int8Rows<T>& a;

  Rows(const Int8Rows<T>& a, Scratch) : a(a) {}
  static int64_t scratch(const Int8Rows<T>&) { return 0; }

  template <class V>
  static auto magnitude(V v) {
    using Bits = std::conditional_t<std::is_same_v<V, F32>, U32, uint32_t>;
    return std::bit_cast<Bits>(v) & 0x7fffffff;
  }

  [[gnu::noinline]] void row(const T* from, int8_t* to, float& scale) {
    // As bits the largest magnitude is also what is not finite.
    U32 most[4] = {};
    uint32_t last = 0;
    sweep(a.columns, [&](auto part, int64_t i) {
      using P = decltype(part);
      const auto bits = magnitude(load<typename P::V>(from + i));
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
      const V whole = load<V>(from + i) * inverse + 0x1.8p23f;
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
    for (int64_t r = task.begin; r < task.end; ++r)
      row(a.input + r * a.step, a.rows + r * a.columns, a.scale[r]);
  }
};

const KernelBuilds<Product, Int8Product> product_builds;
const KernelBuilds<Few, Int8Few> few_builds;
const KernelBuilds<Rows, Int8Rows> row_builds;
const BuildOf<Offsets, Int8Offsets> offset_build;

}  // namespace
}  // namespace llmos
