// The LayerNorm and RMSNorm ops, with a fused residual and dropout.
#include "../layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "../../norm_forward.h"
#include "norm_common.h"

namespace llmos {

template <class T>
void run_norm(const NormForwardArgs<T>& args, int64_t rows) {
  const auto kernel = norm_forward<T>.best();
  const auto run = [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, std::is_same_v<T, float> ? nullptr : floats(args.d).get());
  };
  if (rows * args.d <= kNormGrain) return run(0, rows);
  torch::stable::parallel_for(0, rows, 1 + kNormGrain / 2 / args.d, run);
}
template void run_norm(const NormForwardArgs<float>&, int64_t);
template void run_norm(const NormForwardArgs<bf16>&, int64_t);
template void run_norm(const NormForwardArgs<f16>&, int64_t);

namespace {

int64_t rows_of(const Tensor& x, int64_t d) { return d ? x.numel() / d : 0; }

// As norm_forward.h has it.
Tensor normalize(const Tensor& x_, const Tensor* residual_, const Optional& weight_,
                 const Optional& bias_, int64_t d, double eps, bool center, double dropout_p,
                 const Optional& seed, const Tensor& y, const Tensor* h) {
  const int64_t rows = rows_of(x_, d);
  Tensor stats = output(x_, {center ? 2 : 1, rows}, ScalarType::Float);
  if (rows == 0) return stats;
  const RowView x(x_, d), residual(residual_ ? *residual_ : x_, d);
  const NormParameter weight(weight_, d), bias(bias_, d);
  float* mean = mutable_data<float>(stats);

  for_dtype(x_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const NormForwardArgs<T> args{
        .x = data<T>(*x.tensor),
        .residual = residual_ ? data<T>(*residual.tensor) : nullptr,
        .x_stride = x.stride,
        .residual_stride = residual.stride,
        .weight = weight.data,
        .bias = bias.data,
        .y = mutable_data<T>(y),
        .h = h ? mutable_data<T>(*h) : nullptr,
        .mean = center ? mean : nullptr,
        .rstd = center ? mean + rows : mean,
        .d = d,
        .eps = float(eps),
        .dropout = dropout_of(dropout_p, seed),
    };
    run_norm(args, rows);
  });
  return stats;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy_, const Optional& dh_,
                                                    const Tensor& h_, const Optional& weight_,
                                                    const Tensor& stats_, int64_t d, bool center,
                                                    double dropout_p, const Optional& seed,
                                                    bool weight_grad, bool bias_grad) {
  const ScalarType dtype = weight_ ? weight_->scalar_type() : ScalarType::Float;
  const bool drops = dropout_p > 0;
  const int64_t rows = rows_of(h_, d);
  Tensor dresidual = output_like(h_);
  Tensor dx = drops ? output_like(h_) : output(h_, {0}, h_.scalar_type());
  Tensor dweight = output(h_, {weight_grad ? d : 0}, dtype);
  Tensor dbias = output(h_, {bias_grad ? d : 0}, dtype);
  STD_TORCH_CHECK(dy_.numel() == h_.numel() && dy_.scalar_type() == h_.scalar_type(),
                  "layer_norm: the incoming gradient must have the shape and dtype of the output");
  const RowView dy(dy_, d), dh(dh_ ? *dh_ : dy_, d), h(h_, d);
  const NormParameter weight(weight_, d);
  const Tensor stats = llmos::contiguous(stats_);

  for_dtype(h_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const float* mean = data<float>(stats);
    const NormBackwardArgs<T> args{
        .dy = data<T>(*dy.tensor),
        .dh = dh_ ? data<T>(*dh.tensor) : nullptr,
        .h = data<T>(*h.tensor),
        .dy_stride = dy.stride,
        .dh_stride = dh.stride,
        .h_stride = h.stride,
        .weight = weight.data,
        .mean = center ? mean : nullptr,
        .rstd = center ? mean + rows : mean,
        .dresidual = mutable_data<T>(dresidual),
        .dx = drops ? mutable_data<T>(dx) : nullptr,
        .d = d,
        .dropout = dropout_of(dropout_p, seed),
    };
    const auto kernel = norm_backward<T>.best();
    sum_weight_gradients(rows, d, dweight, dbias,
                         [&](int64_t begin, int64_t end, float* weight_sum, float* bias_sum) {
                           kernel(args, begin, end, weight_sum, bias_sum);
                         });
  });
  return {dresidual, dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&norm_of<&normalize>));
  m.impl("add_layer_norm_forward", TORCH_BOX(&norm_of_sum<&normalize>));
  m.impl("layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace llmos
