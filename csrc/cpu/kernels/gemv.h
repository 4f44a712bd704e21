// Gemv: products of few rows with a weight that is read once and in place, without packing.
#pragma once

#include "microkernel.h"
#include "register_kernel.h"

namespace llmos {
namespace {

// Return a vector of words from elements in memory. If a word is one float, int8 elements are
// converted.
template <class U, class T>
[[gnu::always_inline]] inline U32 load_words(const T* p) {
  if constexpr (std::is_same_v<U, Int16x2>)
    return std::bit_cast<U32>(__builtin_convertvector(load_bits<I8>(p), I16));
  else if constexpr (kPerWord<U> > 1)
    return load_bits<U32>(p);
  else
    return std::bit_cast<U32>(load<F32>(p));
}

// Return the sum of all lanes.
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

// Sums over `inner` elements: at most kMaxRows input rows, as words of U, times rows of a weight
// with elements of W.
template <class U, class W, int64_t kMaxRows>
class Gemv {
 public:
  using S = AccumulatorOf<U>;
  static constexpr int64_t kBlock = 16 * kLanes;  // Columns of out in a task.

  template <class T>
  Gemv(Scratch& scratch, const Matrix<T>& input, int64_t rows, int64_t inner)
      : rows_(rows),
        inner_(inner),
        width_(to_vectors(words<U>(inner))),
        x_(scratch.take<U>(kMaxRows * width_)),
        sums_(scratch.take<S>(kMaxRows * kBlock)) {
    for (int64_t r = 0; r < rows; ++r) {
      pack_row(input.at(r, 0), inner, width_ * kPerWord<U>, x_ + r * width_);
      add_zero_point(x_ + r * width_, width_);
    }
  }
  static int64_t scratch(int64_t inner) {
    return Scratch::size<U>(kMaxRows * to_vectors(words<U>(inner))) +
           Scratch::size<S>(kMaxRows * kBlock);
  }

  // Return the sums [row][kBlock] for rows [begin, end) of the weight.
  const S* run(const Matrix<W>& weight, int64_t begin, int64_t end) {
    int64_t at = begin;
    const auto run = [&](auto count) {
      constexpr int kN = decltype(count)::value;
      for (; at + kN <= end; at += kN) all_rows<kN>(weight, at, sums_ + at - begin);
    };
    // Enough independent sums to hide the latency of the multiply-add.
    if (kLanes == 16 && rows_ == 1) run(std::integral_constant<int, 8>{});
    if (kLanes == 16 || rows_ <= 2) run(std::integral_constant<int, 4>{});
    if (kLanes < 16) run(std::integral_constant<int, 2>{});
    run(std::integral_constant<int, 1>{});
    return sums_;
  }

 private:
  static constexpr int64_t kStep = kLanes * kPerWord<U>;  // Elements in a vector of words.
  static constexpr int64_t kAhead = 16384, kLine = 64;    // Bytes.
  static constexpr int64_t kVectorsPerSum = 64;           // Vectors per partial float32 sum.
  using V = AccumulatorVectorOf<U>;

  template <int kN>
  void all_rows(const Matrix<W>& weight, int64_t first, S* to) {
    // Rows are fetched while others are multiplied: a CPU foresees them within a page alone.
    const int64_t bytes = std::max<int64_t>(inner_ * int64_t(sizeof(W)), 1);
    const int64_t ahead = (kAhead / bytes + kN) / kN * kN * weight.row_stride;
    const W* w[kN];
    for (int n = 0; n < kN; ++n) w[n] = weight.at(first + n, 0);
    const U* x = x_;
    int64_t remaining = rows_;
    for (; remaining > 4; remaining -= 4, x += 4 * width_, to += 4 * kBlock)
      multiply_rows<4, kN>(w, ahead, x, to);
    if (remaining == 4) multiply_rows<4, kN>(w, ahead, x, to);
    if (remaining == 3) multiply_rows<3, kN>(w, ahead, x, to);
    if (remaining == 2) multiply_rows<2, kN>(w, ahead, x, to);
    if (remaining == 1) multiply_rows<1, kN>(w, ahead, x, to);
  }

  template <int kM, int kN>
  [[gnu::noinline]] void multiply_rows(const W* const (&w)[kN], int64_t ahead, const U* x, S* to) {
    const int64_t whole = inner_ / kStep * kStep;
    V total[kM][kN] = {}, sum[kM][kN] = {}, zero_point_sum[kN] = {};
    const auto add = [&](int64_t k, auto load) {
      U32 left[kM];
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) left[m] = load_bits<U32>(x + m * width_ + k / kPerWord<U>);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) {
        const U32 right = load(w[n] + k);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) sum[m][n] = multiply_add<U>(right, left[m], sum[m][n]);
        if constexpr (std::is_same_v<U, Int8x4>)
          zero_point_sum[n] = multiply_add<U>(right, U32{} + 0x80808080, zero_point_sum[n]);
      }
    };
    for (int64_t k = 0; k < whole;) {
      const int64_t stop = kIsInt<U> ? whole : std::min(k + kVectorsPerSum * kStep, whole);
      for (; k < stop; k += kStep) {
        if (k * int64_t(sizeof(W)) % kLine == 0)
#pragma GCC unroll 8
          for (int n = 0; n < kN; ++n) __builtin_prefetch(w[n] + k + ahead, 0, 2);
        add(k, &load_words<U, W>);
      }
      if constexpr (!kIsInt<U>) {
        for (int m = 0; m < kM; ++m)
          for (int n = 0; n < kN; ++n) total[m][n] += std::exchange(sum[m][n], V{});
      }
    }
    if (whole < inner_)
      add(whole, [&](const W* p) {
        W tail[kStep] = {};
        std::memcpy(tail, p, (inner_ - whole) * sizeof(W));
        return load_words<U>(tail);
      });
    for (int n = 0; n < kN; ++n)
      for (int m = 0; m < kM; ++m)
        to[m * kBlock + n] = llmos::total(total[m][n] + sum[m][n] - zero_point_sum[n]);
  }

  const int64_t rows_, inner_, width_;
  U* x_;  // The input [row][word], padded to whole vectors. int8 elements are stored as uint8.
  S* sums_;
};

}  // namespace
}  // namespace llmos
