// The epilogue of a linear layer: bias, activation, dropout and rounding.
#pragma once

#include "activations.h"
#include "philox.h"
#include "vnni_layout.h"

namespace llmos {
namespace {

// Return z rounded to T.
template <class T>
[[gnu::always_inline]] inline F32 rounded(F32 z) {
  if constexpr (std::is_same_v<T, float>) return z;
  T stored[kLanes];
  return store_rounded(stored, z);
}

// Compute y and z for `rows` rows from first_row on, and columns [begin, begin + count). sum(r, j,
// n) returns a vector of the GEMM's result, without bias: row first_row + r, columns from begin + j
// on, of which n are used. `a` has bias, out, pre_activation, outer and epilogue, as
// LinearForwardArgs has.
template <Activation kActivation, class Args, class Sum>
[[gnu::noinline]] void apply_epilogue(const Args& a, int64_t first_row, int64_t rows, int64_t begin,
                                      int64_t count, Sum sum) {
  using T = std::remove_pointer_t<decltype(a.out)>;
  // Rounding z before relu gives the same result as rounding y after it.
  constexpr bool kSkipRounding = kActivation == Activation::None || kActivation == Activation::Relu;
  const Dropout& dropout = a.epilogue.dropout;
  // Local copies: the compiler must assume that stores change the members of `a`.
  const T* const bias = a.bias ? a.bias + begin : nullptr;
  T *const out = a.out, *const pre_activation = a.pre_activation;
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
      if (!kSkipRounding) z = rounded<T>(z);
      F32 y = activate<kActivation>(z);
      if (drops) y *= load<F32>(factors + j % kWidth);
      store_lanes(out + first + j, y, n);
      if (pre_activation) store_lanes(pre_activation + first + j, z, n);
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

// Transpose sums c [columns][step] to transposed [rows][transposed_step].
inline void transpose_sums(const float* c, int64_t step, int64_t columns, int64_t rows,
                           float* transposed, int64_t transposed_step) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const float* lines[kLanes];
    for (int i = 0; i < kLanes; ++i) lines[i] = c + (j + i) * step;
    transpose_rows(lines, rows, transposed + j, transposed_step);
  }
}

}  // namespace
}  // namespace llmos
