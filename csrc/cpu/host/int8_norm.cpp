// Normalization with int8 output: a few rows at a time are normalized, and quantized while they are
// in the cache.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../int8.h"
#include "norm_common.h"

namespace llmos {
namespace {

constexpr int64_t kRowsPerStep = 4;

std::tuple<Tensor, Tensor, Tensor> int8_norm(const Tensor& x_, const Optional& residual_,
                                             const Optional& weight_, const Optional& bias_,
                                             int64_t d, double eps, bool center) {
  const int64_t rows = d ? x_.numel() / d : 0;
  Tensor quantized = output(x_, x_.sizes(), ScalarType::Char);
  Tensor scale = output(x_, {rows}, ScalarType::Float);
  Tensor h = residual_ ? output_like(x_) : output(x_, {0}, x_.scalar_type());
  if (rows == 0) return {quantized, scale, h};
  const RowView x(x_, d), residual(residual_ ? *residual_ : x_, d);
  const NormParameter weight(weight_, d), bias(bias_, d);
  for_dtype(x_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto kernel = norm_forward<T>.best();
    const auto& quantize_kernel = *task_kernel<Int8QuantizeArgs<T>>.best();
    const auto run = [&](int64_t begin, int64_t end) {
      const auto y = std::make_unique_for_overwrite<T[]>(kRowsPerStep * d);
      const Floats scratch = floats(d);
      float mean[kRowsPerStep], rstd[kRowsPerStep];
      for (int64_t row = begin; row < end; row += kRowsPerStep) {
        const int64_t count = std::min(kRowsPerStep, end - row);
        const NormForwardArgs<T> norm{
            .x = data<T>(*x.tensor) + row * x.stride,
            .residual = residual_ ? data<T>(*residual.tensor) + row * residual.stride : nullptr,
            .x_stride = x.stride,
            .residual_stride = residual.stride,
            .weight = weight.data,
            .bias = bias.data,
            .y = y.get(),
            .h = residual_ ? mutable_data<T>(h) + row * d : nullptr,
            .mean = center ? mean : nullptr,
            .rstd = rstd,
            .d = d,
            .eps = float(eps),
        };
        kernel(norm, 0, count, scratch.get());
        Int8QuantizeArgs<T> quantize_args{};
        quantize_args.input = y.get();
        quantize_args.row_stride = quantize_args.columns = d;
        quantize_args.quantized = mutable_data<int8_t>(quantized) + row * d;
        quantize_args.scale = mutable_data<float>(scale) + row;
        quantize_args.max_level = 127;
        const GemmTask all_rows{0, 0, 0, count};
        quantize_kernel.run(quantize_args, &all_rows, 1, nullptr);
      }
    };
    if (rows * d <= kNormGrain) return run(0, rows);
    torch::stable::parallel_for(0, rows, 1 + kNormGrain / 2 / d, run);
  });
  return {quantized, scale, h};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) { m.impl("int8_norm", TORCH_BOX(&int8_norm)); }

}  // namespace llmos
