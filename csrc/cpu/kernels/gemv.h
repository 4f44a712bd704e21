// Products of few rows with a weight that is read once, where it lies.
#pragma once

#include "register_kernel.h"
#include "microkernel.h"

namespace llmos {
namespace {

// A vector of units from elements in memory: of int8 as floats, if U is float.
template <class U, class T>
[[gnu::always_inline]] inline U32 unit_vector(const T* p) {
  if constexpr (std::is_same_v<U, IntPair>)
    return std::bit_cast<U32>(__builtin_convertvector(load_bits<I8>(p), I16));
  else if constexpr (kPerUnit<U> > 1)
    return load_bits<U32>(p);
  else
    return std::bit_cast<U32>(load<F32>(p));
}

// Adds up the lanes.
inline float total(F32 v) { return horizontal_sum(v); }
inline int32_t total(U32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(__m512i(v));
#else
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return int32_t(sum);
#endif
}

// Sums over `inner` elements, of at most kMost rows as units of U with rows of a weight of W.
template <class U, class W, int64_t kMost>
class FewRows {
 public:
  using S = SumOf<U>;
  static constexpr int64_t kBlock = 16 * kLanes;  // Columns of out in a task.

  template <class T>
  FewRows(Scratch& scratch, const Matrix<T>& input, int64_t rows, int64_t inner)
      : rows_(rows),
        inner_(inner),
        width_(to_vectors(units<U>(inner))),
        x_(scratch.take<U>(kMost * width_)),
        sums_(scratch.take<S>(kMost * kBlock)) {
    for (int64_t r = 0; r < rows; ++r) {
      pack_row(input.at(r, 0), inner, width_ * kPerUnit<U>, x_ + r * width_);
      add_offset(x_ + r * width_, width_);
    }
  }
  static int64_t scratch(int64_t inner) {
    return Scratch::size<U>(kMost * to_vectors(units<U>(inner))) + Scratch::size<S>(kMost * kBlock);
  }

  // The sums [row][kBlock] of rows [begin, end) of the weight.
  const S* run(const Matrix<W>& weight, int64_t begin, int64_t end) {
    int64_t at = begin;
    const auto run = [&](auto count) {
      constexpr int kN = decltype(count)::value;
      for (; at + kN <= end; at += kN) all_rows<kN>(weight, at, sums_ + at - begin);
    };
    // Sums enough to hide how long an addition takes.
    if (kLanes == 16 && rows_ == 1) run(std::integral_constant<int, 8>{});
    if (kLanes == 16 || rows_ <= 2) run(std::integral_constant<int, 4>{});
    if (kLanes < 16) run(std::integral_constant<int, 2>{});
    run(std::integral_constant<int, 1>{});
    return sums_;
  }

 private:
  static constexpr int64_t kStep = kLanes * kPerUnit<U>;  // Elements in a vector of units.
  static constexpr int64_t kFold = 64;  // Vectors after which a sum of floats starts anew.
  using V = SumsOf<U>;

  template <int kN>
  void all_rows(const Matrix<W>& weight, int64_t first, S* to) {
    const W* w[kN];
    for (int n = 0; n < kN; ++n) w[n] = weight.at(first + n, 0);
    const U* x = x_;
    int64_t left = rows_;
    for (; left > 4; left -= 4, x += 4 * width_, to += 4 * kBlock) columns<4, kN>(w, x, to);
    if (left == 4) columns<4, kN>(w, x, to);
    if (left == 3) columns<3, kN>(w, x, to);
    if (left == 2) columns<2, kN>(w, x, to);
    if (left == 1) columns<1, kN>(w, x, to);
  }

  template <int kM, int kN>
  [[gnu::noinline]] void columns(const W* const (&w)[kN], const U* x, S* to) {
    const int64_t whole = inner_ / kStep * kStep;
    V total[kM][kN] = {}, sum[kM][kN] = {}, offset[kN] = {};
    const auto add = [&](int64_t k, auto load) {
      U32 left[kM];
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) left[m] = load_bits<U32>(x + m * width_ + k / kPerUnit<U>);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) {
        const U32 right = load(w[n] + k);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) sum[m][n] = multiply_add<U>(right, left[m], sum[m][n]);
        if constexpr (std::is_same_v<U, Quad>)
          offset[n] = multiply_add<U>(right, U32{} + 0x80808080, offset[n]);
      }
    };
    for (int64_t k = 0; k < whole;) {
      const int64_t stop = kIsInt<U> ? whole : std::min(k + kFold * kStep, whole);
      for (; k < stop; k += kStep) add(k, &unit_vector<U, W>);
      if constexpr (!kIsInt<U>) {
        for (int m = 0; m < kM; ++m)
          for (int n = 0; n < kN; ++n) total[m][n] += std::exchange(sum[m][n], V{});
      }
    }
    if (whole < inner_)
      add(whole, [&](const W* p) {
        W tail[kStep] = {};
        std::memcpy(tail, p, (inner_ - whole) * sizeof(W));
        return unit_vector<U>(tail);
      });
    for (int n = 0; n < kN; ++n)
      for (int m = 0; m < kM; ++m)
        to[m * kBlock + n] = llmos::total(total[m][n] + sum[m][n] - offset[n]);
  }

  const int64_t rows_, inner_, width_;
  U* x_;  // [row][unit], with the offset of Quad, up to a whole vector.
  S* sums_;
};

}  // namespace
}  // namespace llmos
