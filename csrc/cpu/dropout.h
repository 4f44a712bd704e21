// The parameters of a dropout mask; kernels/philox.h generates the mask.
#pragma once

#include <cstdint>

namespace llmos {

constexpr int kPhiloxRounds = 7;

struct Dropout {
  uint64_t keys[kPhiloxRounds][2] = {};  // Of each round of Philox, 32 bits each.
  uint64_t offset = 0;
  uint32_t threshold = 0;  // An element is dropped if its Philox random word is below this.
  float scale = 1;         // Factor for the elements that are not dropped, 1 / (1 - p).
};

}  // namespace llmos
