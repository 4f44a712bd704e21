// How fast a CPU multiplies and adds when nothing has to be loaded or stored: the limit of its
// kernels, by which benchmarks judge their rates.
#pragma once

#include <cstdint>

#include "isa_table.h"

namespace llmos {

// Run `rounds` of independent multiply-adds of words of T, and return the operations, of which a
// multiply-add counts two.
using MultiplyAddsFn = int64_t (*)(int64_t rounds);

template <class T>
inline IsaTable<MultiplyAddsFn> multiply_adds;

}  // namespace llmos
