// One source, several builds: CMake compiles cpu/kernels/*.cpp once per level
// with LLMOS_CPU_LEVEL set, and Dispatch calls the best build in use.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"

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

// Whether a level has instructions for elements of T that the level below lacks. From Avx512Bf16 on
// there are such for bfloat16 alone (and for int8): the other types use the build of Avx512, which
// is the same code.
template <class T>
constexpr bool gains(CpuLevel level) {
#ifdef LLMOS_REGISTER_ALL_DTYPES
  return true;
#else
  return level < Avx512Bf16 || std::is_same_v<T, bf16>;
#endif
}

template <class Fn>
struct Build {
  [[gnu::always_inline]] Build(CpuLevel level, Dispatch<Fn>& table, Fn fn) {
    table.builds[level] = fn;
  }
};

}  // namespace llmos
