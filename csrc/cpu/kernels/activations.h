// Activations and their derivatives on vectors; llmos_kernels/ops/_activations.py names them.
#pragma once

#include "../linear.h"
#include "exp.h"

namespace llmos {
namespace {

// 1 / (1 + e^-t).
[[gnu::always_inline]] inline F32 sigmoid(F32 t) {
  const F32 e = exp_negative(t < 0 ? t : -t), inverse = 1 / (1 + e);
  return t < 0 ? e * inverse : inverse;
}

// Of the normal distribution above t, over e^(-t^2/2): a polynomial of 1 / (1 + 0.33 t), fitted to
// 2e-9 of it.
constexpr float kNormal[] = {-2.680669635e-2f, 1.532838374e-1f, -3.325183692e-1f, 3.0409237e-1f,
                             -1.162484601e-1f, 1.505062786e-1f, 1.022793332e-1f,  1.339547171e-1f,
                             1.314493189e-1f,  7.668996521e-6f};

// The normal distribution up to t; power is e^(-t^2/2).
[[gnu::always_inline]] inline F32 normal(F32 t, F32& power) {
  const F32 near = 1 / fma(t < 0 ? -t : t, F32{} + 0.33f, F32{} + 1);
  power = exp_negative(t * t * -0.5f);
  F32 p = F32{} + kNormal[0];
#pragma GCC unroll 9
  for (int i = 1; i < 10; ++i) p = fma(p, near, F32{} + kNormal[i]);
  const F32 tail = p * power;
  return t < 0 ? tail : 1 - tail;
}

constexpr float kTanhScale = 0.7978845608028654f, kTanhCube = 0.044715f, kDensity = 0.3989422804f;

// NaN stays NaN in all of them.
template <Activation kActivation>
[[gnu::always_inline]] inline F32 activate(F32 z) {
  if constexpr (kActivation == Activation::Relu) return z <= 0 ? F32{} : z;
  if constexpr (kActivation == Activation::Relu2) return z <= 0 ? F32{} : z * z;
  if constexpr (kActivation == Activation::Gelu) {
    F32 power;
    return z * normal(z, power);
  }
  if constexpr (kActivation == Activation::GeluTanh)
    return z * sigmoid(2 * kTanhScale * fma(kTanhCube * z, z * z, z));
  if constexpr (kActivation == Activation::Silu) return z * sigmoid(z);
  return z;
}

// The derivative, from what is kept: y for relu, else z.
template <Activation kActivation>
[[gnu::always_inline]] inline F32 slope(F32 kept) {
  const F32 z = kept, one = F32{} + 1;
  if constexpr (kActivation == Activation::Relu) return z <= 0 ? F32{} : one;
  if constexpr (kActivation == Activation::Relu2) return z <= 0 ? F32{} : z + z;
  if constexpr (kActivation == Activation::Gelu) {
    F32 power;
    const F32 below = normal(z, power);
    return fma(z * kDensity, power, below);
  }
  if constexpr (kActivation == Activation::GeluTanh) {
    const F32 s = sigmoid(2 * kTanhScale * fma(kTanhCube * z, z * z, z));
    const F32 inner = 2 * kTanhScale * fma(3 * kTanhCube * z, z, one);
    return fma(z * s * (1 - s), inner, s);
  }
  if constexpr (kActivation == Activation::Silu) {
    const F32 s = sigmoid(z);
    return s * fma(z, 1 - s, one);
  }
  return one;
}

// Calls body with the activation as a constant.
template <class Body>
inline void with_activation(Activation activation, Body body) {
  switch (activation) {
#define LLMOS_CASE(name) \
  case Activation::name: \
    return body(std::integral_constant<Activation, Activation::name>{});
    LLMOS_CASE(Relu)
    LLMOS_CASE(Relu2)
    LLMOS_CASE(Gelu)
    LLMOS_CASE(GeluTanh)
    LLMOS_CASE(Silu)
    LLMOS_CASE(None)
#undef LLMOS_CASE
  }
}

}  // namespace
}  // namespace llmos
