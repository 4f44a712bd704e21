// The forward ops of LayerNorm and RMSNorm, by whichever function normalizes rows.
#pragma once

#include <tuple>

#include "tensor_view.h"

namespace llmos {

// kNormalize fills y and, with a residual, h (both like x); it returns stats: mean and rstd [2,
// rows], or rstd [1, rows].
template <auto kNormalize>
std::tuple<Tensor, Tensor> norm_of(const Tensor& x, const Optional& weight, const Optional& bias,
                                   int64_t d, double eps, bool center) {
  Tensor y = output_like(x);
  Tensor stats = kNormalize(x, nullptr, weight, bias, d, eps, center, 0, {}, y, nullptr);
  return {y, stats};
}

template <auto kNormalize>
std::tuple<Tensor, Tensor, Tensor> norm_of_sum(const Tensor& x, const Tensor& residual,
                                               const Optional& weight, const Optional& bias,
                                               int64_t d, double eps, bool center, double dropout_p,
                                               const Optional& seed) {
  STD_TORCH_CHECK(residual.numel() == x.numel() && residual.scalar_type() == x.scalar_type(),
                  "add_layer_norm: residual must have the shape and dtype of input");
  Tensor y = output_like(x), h = output_like(x);
  Tensor stats = kNormalize(x, &residual, weight, bias, d, eps, center, dropout_p, seed, y, &h);
  return {y, h, stats};
}

}  // namespace llmos
