// The forward of LayerNorm and RMSNorm, with a fused residual and dropout. A row is read once, if
// it can be read 16 bytes at a time and fits into the registers of a block; else again for each
// pass.
#include "norm.h"

#include <tuple>

namespace llmos {
namespace {

int64_t rows_of(const Tensor& x, int64_t d) { return d ? x.numel() / d : 0; }

// Fill y and, with a residual, h (both like x); return stats: mean and rstd [2, rows], or rstd [1,
// rows].
Tensor normalize(const Tensor& x_, const Tensor* residual_, const Optional& weight_,
                 const Optional& bias_, int64_t d, double eps, bool center, double dropout_p,
                 const Optional& seed, const Tensor& y, const Tensor* h) {
  const int64_t rows = rows_of(x_, d);
  Tensor stats = output(x_, {center ? 2 : 1, rows}, ScalarType::Float);
  if (rows == 0) return stats;
  const RowView x(x_, d), residual(residual_ ? *residual_ : x_, d);
  const NormParameter weight(weight_, d), bias(bias_, d);
  float* mean = mutable_data<float>(stats);
  const Device device(x_);
  for_dtypes(x_.scalar_type(), weight_, bias_, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const NormArgs<T, W> args{
        .x = data<T>(*x.tensor),
        .residual = residual_ ? data<T>(*residual.tensor) : nullptr,
        .x_stride = x.stride,
        .residual_stride = residual.stride,
        .weight = weight.of<W>(),
        .bias = bias.of<W>(),
        .y = mutable_data<T>(y),
        .h = h ? mutable_data<T>(*h) : nullptr,
        .quantized = nullptr,
        .scale = nullptr,
        .mean = center ? mean : nullptr,
        .rstd = center ? mean + rows : mean,
        .rows = rows,
        .d = d,
        .center = center,
        .eps = float(eps),
        .dropout = dropout_of(dropout_p, seed),
    };
    launch_norm<false>(device, args);
  });
  return stats;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& weight, const Optional& bias,
                                   int64_t d, double eps, bool center) {
  Tensor y = output_like(x);
  Tensor stats = normalize(x, nullptr, weight, bias, d, eps, center, 0, {}, y, nullptr);
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> add_forward(const Tensor& x, const Tensor& residual,
                                               const Optional& weight, const Optional& bias,
                                               int64_t d, double eps, bool center, double dropout_p,
                                               const Optional& seed) {
  STD_TORCH_CHECK(residual.numel() == x.numel() && residual.scalar_type() == x.scalar_type(),
                  "add_layer_norm: residual must have the shape and dtype of input");
  Tensor y = output_like(x), h = output_like(x);
  Tensor stats = normalize(x, &residual, weight, bias, d, eps, center, dropout_p, seed, y, &h);
  return {y, h, stats};
}

Choice choose_layer_norm_forward("layer_norm_forward", kFewRows, 3);
Choice choose_add_layer_norm_forward("add_layer_norm_forward", kFewRows, 4);

}  // namespace

LLMOS_CUDA_OPS(m) {
  own<choose_layer_norm_forward, &forward>(m);
  own<choose_add_layer_norm_forward, &add_forward>(m);
}

}  // namespace llmos
