// The activations of linear layers, of one number.
#pragma once

#include "../activation.h"
#include "kernel.h"

namespace llmos {

// Return the activation of z. NaN stays NaN.
LLMOS_DEVICE float activate(Activation activation, float z) {
  constexpr float kTanhScale = 0.7978845608028654f, kTanhCube = 0.044715f,
                  kInverseSqrt2 = 0.7071067811865476f;
  const auto sigmoid = [](float t) { return 1 / (1 + expf(-t)); };
  switch (activation) {
    case Activation::Relu:
      return z <= 0 ? 0 : z;
    case Activation::Relu2:
      return z <= 0 ? 0 : z * z;
    case Activation::Gelu:
      return 0.5f * z * erfcf(-z * kInverseSqrt2);
    case Activation::GeluTanh:
      return z * sigmoid(2 * kTanhScale * (z + kTanhCube * z * z * z));
    case Activation::Silu:
      return z * sigmoid(z);
    case Activation::None:
      break;
  }
  return z;
}

}  // namespace llmos
