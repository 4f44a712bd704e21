// A row in the registers of the threads that share it: its moments, and its quantization to int8.
#pragma once

#include "kernel.h"

namespace llmos {

// The most elements that a thread holds, in packs of 16 bytes. Single elements are not held: their
// addresses alone would take the registers.
constexpr int kHeld = 16;
// A row gets more threads until each has no more elements than this.
constexpr int kPreferred = 8;

// The packs of one thread in a row of d elements. Those that are not held are read again.
template <int kPack>
struct Row {
  static constexpr int kPacks = kPack > 1 ? kHeld / kPack : 0;
  float held[kPacks ? kPacks : 1][kPack];
  int64_t first, step, d;

  LLMOS_DEVICE explicit Row(int64_t d)
      : first(int64_t(threadIdx.x) * kPack), step(int64_t(blockDim.x) * kPack), d(d) {}

  // Read the row by read(at, v), and call body(v) for each pack.
  template <class Read, class Body>
  LLMOS_DEVICE void read(Read read, Body body) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (first + k * step >= d) continue;
      read(first + k * step, held[k]);
      body(held[k]);
    }
    for (int64_t at = first + kPacks * step; at < d; at += step) {
      float v[kPack];
      read(at, v);
      body(v);
    }
  }

  // Call body(at, v) for each pack; again(at, v) reads those that are not held.
  template <class Again, class Body>
  LLMOS_DEVICE void each(Again again, Body body) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first + k * step < d) body(first + k * step, held[k]);
    for (int64_t at = first + kPacks * step; at < d; at += step) {
      float v[kPack];
      again(at, v);
      body(at, v);
    }
  }
};

struct Moments {
  float mean, rstd;
};

// Return mean and rstd of a row that read(at, v) reads, and again(at, v) once more; without
// `center` the mean is 0.
template <int kPack, class Read, class Again>
LLMOS_DEVICE Moments moments_of(Row<kPack>& row, Read read, Again again, bool center, float eps) {
  float sum[1] = {};
  row.read(read, [&](const float (&v)[kPack]) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum[0] += center ? v[i] : v[i] * v[i];
  });
  sum_over_row(sum);
  float mean = 0, spread = sum[0] / float(row.d);
  if (center) {
    // The mean of the differences corrects the rounding of the mean, so that the variance of a
    // constant row is 0.
    mean = spread;
    float sums[2] = {};
    row.each(again, [&](int64_t, const float (&v)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float delta = v[i] - mean;
        sums[0] += delta;
        sums[1] += delta * delta;
      }
    });
    sum_over_row(sums);
    const float shift = sums[0] / float(row.d);
    mean += shift;
    spread = sums[1] / float(row.d) - shift * shift;
    spread = spread < 0 ? 0 : spread;
  }
  return {mean, 1 / sqrtf(spread + eps)};
}

// Quantize a row to int8, with its scale; each(body) calls body(at, v) for each pack of this
// thread. llmos_kernels/ops/int8.py has the formulas.
template <int kPack, class Each>
LLMOS_DEVICE void quantize_row(Each each, int8_t* to, float* scale) {
  constexpr float kSmallest = 1e-36f, kLevels = 127;
  constexpr uint32_t kInfinity = 0x7f800000;
  // The largest magnitude, compared as integers, so that infinity and NaN count as largest.
  uint32_t bits[1] = {};
  each([&](int64_t, const float (&v)[kPack]) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const uint32_t magnitude = __float_as_uint(v[i]) & 0x7fffffff;
      bits[0] = magnitude > bits[0] ? magnitude : bits[0];
    }
  });
  over_row(bits, 0u, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  const float largest = __uint_as_float(bits[0]);
  const bool is_finite = bits[0] < kInfinity, is_zero = !is_finite || largest < kSmallest;
  const float inverse = is_zero ? 0 : kLevels / largest;
  if (threadIdx.x == 0) {
    const float nan = __uint_as_float(0x7fc00000);
    store_global(scale, !is_finite ? nan : is_zero ? 0 : largest / kLevels);
  }
  each([&](int64_t at, const float (&v)[kPack]) {
    int8_t level[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      level[i] = is_zero ? int8_t(0) : int8_t(__float2int_rn(__fmul_rn(v[i], inverse)));
    store_raw(to + at, level);
  });
}

}  // namespace llmos
