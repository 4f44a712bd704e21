// The forward of LayerNorm and RMSNorm, with a fused residual and dropout. A row is read once, if
// it can be read 16 bytes at a time and fits into the registers of a block; else again for each
// pass.
#include "norm.h"

#include "../norm_forward.h"

namespace llmos {
namespace {

int64_t rows_of(const Tensor& x, int64_t d) { return d ? x.numel() / d : 0; }

// As norm_forward.h has it.
Tensor normalize(const Tensor& x_, const Tensor* residual_, const Optional& weight_,
                 const Optional& bias_, int64_t d, double eps, bool center, double dropout_p,
                 const Optional& seed, const Tensor& y, const Tensor* h) {
  const int64_t rows = rows_of(x_, d);
  Tensor stats = output(x_, {center ? 2 : 1, rows}, ScalarType::Float);
  if (rows == 0) return stats;
  const NormInputs inputs(x_, residual_, weight_, bias_, d, eps, center);
  float* mean = mutable_data<float>(stats);
  const Device device(x_);
  for_dtypes(x_.scalar_type(), weight_, bias_, [&](auto t, auto w) {
    using T = decltype(t);
    auto args = inputs.of<T, decltype(w)>();
    args.y = mutable_data<T>(y);
    args.h = h ? mutable_data<T>(*h) : nullptr;
    args.mean = center ? mean : nullptr;
    args.rstd = center ? mean + rows : mean;
    args.dropout = dropout_of(dropout_p, seed);
    launch_norm<false>(device, args);
  });
  return stats;
}

Choice choose_layer_norm_forward("layer_norm_forward", kFewRows, 3);
Choice choose_add_layer_norm_forward("add_layer_norm_forward", kFewRows, 4);

}  // namespace

LLMOS_CUDA_OPS(m) {
  own<choose_layer_norm_forward, &norm_of<&normalize>>(m);
  own<choose_add_layer_norm_forward, &norm_of_sum<&normalize>>(m);
}

}  // namespace llmos
