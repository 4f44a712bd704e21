// The parameters of a dropout mask; kernels/philox.h generates the mask.
#pragma once

#include <cstdint>

namespace llmos {

struct Dropout {
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;  // An element is dropped if its Philox random word is below this.
  float scale = 1;         // Factor for the elements that are not dropped, 1 / (1 - p).
};

}  // namespace llmos
