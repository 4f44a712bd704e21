// What follows the sums of a product: bias, activation, dropout, rounding.
#pragma once

#include "activations.h"
#include "philox.h"
#include "vnni_layout.h"

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
  // Stores could change what a points to, for all the compiler knows.
  const T* const bias = a.bias ? a.bias + begin : nullptr;
  T *const out = a.out, *const kept = a.kept;
  const int64_t outer = a.outer;
  const bool drops = dropout.threshold;
  constexpr int64_t kWidth = 4 * kLanes;
  float factors[kWidth];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = (first_row + r) * outer + begin;
    const auto vector = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      if (drops && j % kWidth == 0) dropout_block(dropout, first_row + r, begin + j, factors);
      F32 z = sum(r, j, n);
      if (bias) z += load_lanes<F32>(bias + j, n);
      if (!kSame) z = rounded<T>(z);
      F32 y = activate<kActivation>(z);
      if (drops) y *= load<F32>(factors + j % kWidth);
      store_lanes(out + first + j, y, n);
      if (kept) store_lanes(kept + first + j, z, n);
    };
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) vector(j, kLanes);
    if (j < count) vector(j, count - j);
  }
}

// Sums in memory, [row][step].
struct StoredSums {
  const float* sums;
  int64_t step;

  [[gnu::always_inline]] F32 operator()(int64_t r, int64_t j, int64_t) const {
    return load<F32>(sums + r * step + j);
  }
};

// Sums c [columns][step] of a block, turned into turned [rows][turned_step].
inline void turn_sums(const float* c, int64_t step, int64_t columns, int64_t rows, float* turned,
                      int64_t turned_step) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const float* lines[kLanes];
    for (int i = 0; i < kLanes; ++i) lines[i] = c + (j + i) * step;
    transpose_rows(lines, rows, turned + j, turned_step);
  }
}

}  // namespace
}  // namespace llmos
