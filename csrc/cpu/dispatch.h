// One source, several builds: CMake compiles cpu/kernels/*.cpp once per level
// with LLMOS_CPU_LEVEL set, and Dispatch calls the best build in use.
#pragma once

#include <cstdint>

#include "level.h"

namespace llmos {

// Storage of a 16-bit element; kernels/vec.h converts it.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A table of one function's builds. Baseline is always there.
template <class Fn>
struct Dispatch {
  Fn builds[CpuLevels] = {};

  Fn best() const {
    int level = cpu_level();
    while (!builds[level]) --level;
    return builds[level];
  }
};

template <class Fn>
struct Build {
  [[gnu::always_inline]] Build(CpuLevel level, Dispatch<Fn>& table, Fn fn) {
    table.builds[level] = fn;
  }
};

}  // namespace llmos
