// Vectorised activations and their derivatives; llmos_kernels/ops/_activations.py defines them.
#pragma once

#include "../linear.h"
#include "exp.h"

namespace llmos {
namespace {

// Return 1 / (1 + exp(-t)).
[[gnu::always_inline]] inline F32 sigmoid(F32 t) {
  const F32 e = exp_negative(t < 0 ? t : -t), inverse = 1 / (1 + e);
  return t < 0 ? e * inverse : inverse;
}

// Coefficients of a polynomial in 1 / (1 + 0.33 t): the upper tail of the normal distribution
// divided by exp(-t^2/2), with an error of 2e-9.
constexpr float kTailCoefficients[] = {
    -2.680669635e-2f, 1.532838374e-1f, -3.325183692e-1f, 3.0409237e-1f,   -1.162484601e-1f,
    1.505062786e-1f,  1.022793332e-1f, 1.339547171e-1f,  1.314493189e-1f, 7.668996521e-6f};

// Return the cumulative normal distribution at t, and exp(-t^2/2) in `exponential`.
[[gnu::always_inline]] inline F32 normal_cdf(F32 t, F32& exponential) {
  const F32 reciprocal = 1 / fma(t < 0 ? -t : t, F32{} + 0.33f, F32{} + 1);
  exponential = exp_negative(t * t * -0.5f);
  F32 p = F32{} + kTailCoefficients[0];
#pragma GCC unroll 9
  for (int i = 1; i < 10; ++i) p = fma(p, reciprocal, F32{} + kTailCoefficients[i]);
  const F32 tail = p * exponential;
  return t < 0 ? tail : 1 - tail;
}

constexpr float kTanhScale = 0.7978845608028654f, kTanhCube = 0.044715f,
                kInverseSqrt2Pi = 0.3989422804f;

// Return the activation of z. NaN stays NaN.
template <Activation kActivation>
[[gnu::always_inline]] inline F32 activate(F32 z) {
  if constexpr (kActivation == Activation::Relu) return z <= 0 ? F32{} : z;
  if constexpr (kActivation == Activation::Relu2) return z <= 0 ? F32{} : z * z;
  if constexpr (kActivation == Activation::Gelu) {
    F32 exponential;
    return z * normal_cdf(z, exponential);
  }
  if constexpr (kActivation == Activation::GeluTanh)
    return z * sigmoid(2 * kTanhScale * fma(kTanhCube * z, z * z, z));
  if constexpr (kActivation == Activation::Silu) return z * sigmoid(z);
  return z;
}

// Return the derivative from the saved activation: y for relu, else z.
template <Activation kActivation>
[[gnu::always_inline]] inline F32 activation_derivative(F32 saved) {
  const F32 z = saved, ones = F32{} + 1;
  if constexpr (kActivation == Activation::Relu) return z <= 0 ? F32{} : ones;
  if constexpr (kActivation == Activation::Relu2) return z <= 0 ? F32{} : z + z;
  if constexpr (kActivation == Activation::Gelu) {
    F32 exponential;
    const F32 below = normal_cdf(z, exponential);
    return fma(z * kInverseSqrt2Pi, exponential, below);
  }
  if constexpr (kActivation == Activation::GeluTanh) {
    const F32 s = sigmoid(2 * kTanhScale * fma(kTanhCube * z, z * z, z));
    const F32 inner = 2 * kTanhScale * fma(3 * kTanhCube * z, z, ones);
    return fma(z * s * (1 - s), inner, s);
  }
  if constexpr (kActivation == Activation::Silu) {
    const F32 s = sigmoid(z);
    return s * fma(z, 1 - s, ones);
  }
  return ones;
}

// Call body with the activation as a compile-time constant.
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
