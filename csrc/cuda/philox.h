// Philox4x32-7 random numbers (Salmon et al., SC 2011) for dropout. The bits equal those of the
// definition in llmos_kernels/ops/_dropout.py.
#pragma once

#include "kernel.h"

namespace llmos {

// The parameters of a dropout mask. Seed and offset are read on the device, so that a replayed CUDA
// graph draws anew.
struct Dropout {
  const int64_t* seed = nullptr;  // [2]: seed and offset. Null: nothing is dropped.
  uint32_t threshold = 0;         // An element is dropped if its random word is below this.
  float scale = 1;                // Factor for the elements that are not dropped, 1 / (1 - p).
};

// A dropout mask, as a thread uses it.
struct Mask {
  uint32_t key[2], offset, threshold;
  float scale;

  LLMOS_DEVICE explicit Mask(const Dropout& dropout)
      : key{}, offset(0), threshold(dropout.threshold), scale(dropout.scale) {
    if (!dropout.seed) return;
    const auto seed = load_global<uint64_t>(dropout.seed);
    key[0] = uint32_t(seed);
    key[1] = uint32_t(seed >> 32);
    offset = uint32_t(load_global<uint64_t>(dropout.seed + 1));
  }

  // Write four random words for columns 4 * group to 4 * group + 3 of a row.
  LLMOS_DEVICE void words(int64_t row, uint32_t group, uint32_t (&c)[4]) const {
    uint32_t k0 = key[0], k1 = key[1];
    c[0] = group;
    c[1] = uint32_t(row);
    c[2] = uint32_t(uint64_t(row) >> 32);
    c[3] = offset;
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint32_t high0 = __umulhi(0xD2511F53, c[0]), low0 = 0xD2511F53 * c[0];
      const uint32_t high1 = __umulhi(0xCD9E8D57, c[2]), low1 = 0xCD9E8D57 * c[2];
      c[0] = high1 ^ c[1] ^ k0;
      c[1] = low1;
      c[2] = high0 ^ c[3] ^ k1;
      c[3] = low0;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }

  // Multiply kCount elements from column `at` on by 0 or the scale. kCount is 1 or divides `at`.
  template <int kCount>
  LLMOS_DEVICE void apply(int64_t row, int64_t at, float (&v)[kCount]) const {
    uint32_t word[4];
    if constexpr (kCount == 1) {
      words(row, uint32_t(at / 4), word);
      const int i = int(at % 4);
      const uint32_t mine = i == 0 ? word[0] : i == 1 ? word[1] : i == 2 ? word[2] : word[3];
      v[0] *= mine < threshold ? 0 : scale;
    } else {
      static_assert(kCount % 4 == 0);
#pragma unroll
      for (int first = 0; first < kCount; first += 4) {
        words(row, uint32_t((at + first) / 4), word);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[first + i] *= word[i] < threshold ? 0 : scale;
      }
    }
  }
};

}  // namespace llmos
