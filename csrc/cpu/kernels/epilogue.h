// What follows the sums of a product: bias, activation, dropout, rounding.
#pragma once

#include "activations.h"
#include "philox.h"

namespace llmos {
namespace {

// z as it is rounded to T.
template <class T>
[[gnu::always_inline]] inline F32 rounded(F32 z) {
  if constexpr (std::is_same_v<T, float>) return z;
  T stored[kLanes];
  return store_rounded(stored, z);
}

// y and z of columns [begin, begin + count), row by row from first_row on. sum(r, j, n) is a vector
// of the product without its bias, r and j from there, of which n lanes are wanted. Of a: bias,
// out, kept, outer and epilogue, as LinearForward has them.
template <Activation kActivation, class Args, class Sum>
[[gnu::noinline]] void finish(const Args& a, int64_t first_row, int64_t rows, int64_t begin,
                              int64_t count, Sum sum) {
  using T = std::remove_pointer_t<decltype(a.out)>;
  // Rounding before relu or after it gives the same.
  constexpr bool kSame = kActivation == Activation::None || kActivation == Activation::Relu;
  const Dropout& dropout = a.epilogue.dropout;
  constexpr int64_t kWidth = 4 * kLanes;
  float factors[kWidth];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = (first_row + r) * a.outer + begin;
    for (int64_t at = 0; at < count; at += kWidth) {
      if (dropout.threshold) dropout_block(dropout, first_row + r, begin + at, factors);
      for (int64_t j = at; j < std::min(at + kWidth, count); j += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, count - j);
        F32 z = sum(r, j, n);
        if (a.bias) z += load_lanes<F32>(a.bias + begin + j, n);
        if (!kSame) z = rounded<T>(z);
        F32 y = activate<kActivation>(z);
        if (dropout.threshold) y *= load<F32>(factors + j - at);
        store_lanes(a.out + first + j, y, n);
        if (a.kept) store_lanes(a.kept + first + j, z, n);
      }
    }
  }
}

// Sums in memory, [row][step].
struct StoredSums {
  const float* sums;
  int64_t step;

  template <class Args>
  StoredSums(const Args&, int64_t, int64_t, const float* sums, int64_t step)
      : sums(sums), step(step) {}

  [[gnu::always_inline]] F32 operator()(int64_t r, int64_t j, int64_t) const {
    return load<F32>(sums + r * step + j);
  }
};

// Sums c [columns][step] of a block, turned into turned [rows][turned_step].
template <class Unit>
inline void turn_sums(const Unit* c, int64_t step, int64_t columns, int64_t rows, Unit* turned,
                      int64_t turned_step) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Unit* lines[kLanes];
    for (int i = 0; i < kLanes; ++i) lines[i] = c + (j + i) * step;
    transpose_rows(lines, rows, turned + j, turned_step);
  }
}

}  // namespace
}  // namespace llmos
