// A function table with one entry per instruction set (ISA). CMake compiles each source in
// cpu/kernels/ once per ISA, with LLMOS_ISA set; each of these builds registers its functions here
// when the library is loaded, and host code calls the best one that the CPU can run.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"

namespace llmos {

// A 16-bit floating-point element as it is stored; kernels/vec.h converts it.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The builds of one function. The Baseline entry is always set; an ISA without an entry of its own
// uses the next lower one.
template <class Fn>
struct IsaTable {
  Fn by_isa[kIsaCount] = {};

  Fn best() const {
    int isa = isa_in_use();
    while (!by_isa[isa]) --isa;
    return by_isa[isa];
  }
};

// Return true if kernels for elements of T gain from the instructions that `isa` adds to the ISA
// below it. Avx512Bf16 and Amx add instructions for bfloat16 (and int8) alone: float32 and float16
// kernels would be the same code as in Avx512, so they are not registered again.
template <class T>
constexpr bool isa_benefits(Isa isa) {
#ifdef LLMOS_REGISTER_ALL_DTYPES
  return true;
#else
  return isa < Avx512Bf16 || std::is_same_v<T, bf16>;
#endif
}

template <class Fn>
struct Register {
  [[gnu::always_inline]] Register(Isa isa, IsaTable<Fn>& table, Fn fn) { table.by_isa[isa] = fn; }
};

}  // namespace llmos
