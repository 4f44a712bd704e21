// The activations of linear layers; llmos_kernels/ops/_activations.py defines them.
#pragma once

#include <cstdint>

namespace llmos {

// The indices of NAMES there.
enum class Activation : int64_t { None, Relu, Relu2, Gelu, GeluTanh, Silu };

}  // namespace llmos
