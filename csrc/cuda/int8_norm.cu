// Normalization with int8 rows as its result; llmos_kernels/ops/int8_norm.py has the formulas.
#include <tuple>

#include "norm.h"

namespace llmos {
namespace {

std::tuple<Tensor, Tensor, Tensor> int8_norm(const Tensor& x_, const Optional& residual_,
                                             const Optional& weight_, const Optional& bias_,
                                             int64_t d, double eps, bool center) {
  const int64_t rows = d ? x_.numel() / d : 0;
  Tensor quantized = output(x_, x_.sizes(), ScalarType::Char);
  Tensor scale = output(x_, {rows}, ScalarType::Float);
  Tensor h = residual_ ? output_like(x_) : output(x_, {0}, x_.scalar_type());
  if (rows == 0) return {quantized, scale, h};
  const NormInputs inputs(x_, residual_ ? &*residual_ : nullptr, weight_, bias_, d, eps, center);
  const Device device(x_);
  for_dtypes(x_.scalar_type(), weight_, bias_, [&](auto t, auto w) {
    using T = decltype(t);
    auto args = inputs.of<T, decltype(w)>();
    args.h = residual_ ? mutable_data<T>(h) : nullptr;
    args.quantized = mutable_data<int8_t>(quantized);
    args.scale = mutable_data<float>(scale);
    launch_norm<true>(device, args);
  });
  return {quantized, scale, h};
}

Choice choose_int8_norm("int8_norm", kFewRows, 4);

}  // namespace

LLMOS_CUDA_OPS(m) { own<choose_int8_norm, &int8_norm>(m); }

}  // namespace llmos
