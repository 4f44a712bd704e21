// What a dropout mask is made of; kernels/philox.h makes it.
#pragma once

#include <cstdint>

namespace llmos {

struct Dropout {
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;  // An element whose Philox word is below it is dropped.
  float scale = 1;         // What a kept element is multiplied by.
};

}  // namespace llmos
