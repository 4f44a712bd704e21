// Normalised rows as int8: a few rows at a time are normalised, and quantised while they are near.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../int8.h"
#include "norm_common.h"

namespace llmos {
namespace {

constexpr int64_t kRowsTogether = 4;

std::tuple<Tensor, Tensor, Tensor> int8_norm(const Tensor& x_, const Optional& residual_,
                                             const Optional& weight_, const Optional& bias_,
                                             int64_t d, double eps, bool center) {
  const int64_t rows = d ? x_.numel() / d : 0;
  Tensor quantized = output(x_, x_.sizes(), ScalarType::Char);
  Tensor scale = output(x_, {rows}, ScalarType::Float);
  Tensor h = residual_ ? output_like(x_) : output(x_, {0}, x_.scalar_type());
  if (rows == 0) return {quantized, scale, h};
  const Rows x(x_, d), residual(residual_ ? *residual_ : x_, d);
  const Parameter weight(weight_, d), bias(bias_, d);
  dispatch(x_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto kernel = norm_forward<T>.best();
    const auto& row_kernel = *task_kernel<Int8Rows<T>>.best();
    const auto run = [&](int64_t begin, int64_t end) {
      const auto y = std::make_unique_for_overwrite<T[]>(kRowsTogether * d);
      const Floats scratch = floats(d);
      float mean[kRowsTogether], rstd[kRowsTogether];
      for (int64_t row = begin; row < end; row += kRowsTogether) {
        const int64_t count = std::min(kRowsTogether, end - row);
        const NormForward<T> norm{
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
        Int8Rows<T> to{};
        to.input = y.get();
        to.step = to.columns = d;
        to.rows = mutable_data<int8_t>(quantized) + row * d;
        to.scale = mutable_data<float>(scale) + row;
        to.levels = 127;
        const ProductTask whole{0, 0, 0, count};
        row_kernel.run(to, &whole, 1, nullptr);
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
