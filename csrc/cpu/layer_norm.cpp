#include "layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "../rows.h"
#include "host.h"

namespace llmos {
namespace {

// Below this many elements a thread costs more than it brings.
constexpr int64_t kGrain = 32768;

// Rows that share one partial sum of the weight gradient: fixed by the shape alone, so
// that the result does not depend on the number of threads.
int64_t rows_per_chunk(int64_t rows) { return std::max<int64_t>(32, (rows + 63) / 64); }

int64_t rows_of(const Tensor& x, int64_t d) { return d ? x.numel() / d : 0; }

// A weight or bias as d floats, of which it keeps a copy where its dtype is another.
struct Parameter {
  Optional tensor;
  Floats copy;
  const float* data = nullptr;

  Parameter(const Optional& t, int64_t d) {
    if (!t) return;
    STD_TORCH_CHECK(t->numel() == d, "layer_norm: expected a weight or bias of ", d,
                    " elements, got ", t->numel());
    if (!t->is_contiguous()) tensor = torch::stable::contiguous(*t);
    const Tensor& packed = tensor ? *tensor : *t;
    if (t->scalar_type() == ScalarType::Float) {
      data = llmos::data<float>(packed);
      return;
    }
    copy = floats(d);
    dispatch(t->scalar_type(), [&](auto w) {
      using W = decltype(w);
      to_float<W>.best()(llmos::data<W>(packed), copy.get(), d);
    });
    data = copy.get();
  }
};

// Fills y [like x], h [like x, with a residual only] and stats [mean and rstd, or rstd].
Tensor normalize(const Tensor& x_, const Tensor* residual_, const Optional& weight_,
                 const Optional& bias_, int64_t d, double eps, bool center, double dropout_p,
                 const Optional& seed, const Tensor& y, const Tensor* h) {
  const int64_t rows = rows_of(x_, d);
  Tensor stats = output(x_, {center ? 2 : 1, rows}, ScalarType::Float);
  if (rows == 0) return stats;
  const Rows x(x_, d), residual(residual_ ? *residual_ : x_, d);
  const Parameter weight(weight_, d), bias(bias_, d);
  float* mean = mutable_data<float>(stats);

  dispatch(x_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const NormForward<T> args{
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
    const auto kernel = norm_forward<T>.best();
    const auto run = [&](int64_t begin, int64_t end) {
      kernel(args, begin, end, std::is_same_v<T, float> ? nullptr : floats(d).get());
    };
    if (rows * d <= kGrain) return run(0, rows);
    torch::stable::parallel_for(0, rows, 1 + kGrain / 2 / d, run);
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
  const Rows dy(dy_, d), dh(dh_ ? *dh_ : dy_, d), h(h_, d);
  const Parameter weight(weight_, d);
  const Tensor stats = llmos::contiguous(stats_);

  const bool partials = weight_grad || bias_grad;
  const int64_t chunk = rows_per_chunk(rows), chunks = (rows + chunk - 1) / chunk;
  // [chunk][weight, bias][d]
  Tensor partial = output(h_, {partials ? chunks * 2 * d : 0}, ScalarType::Float);
  float* sums = partials ? mutable_data<float>(partial) : nullptr;

  dispatch(h_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const float* mean = data<float>(stats);
    const NormBackward<T> args{
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
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* sum = sums ? sums + i * 2 * d : nullptr;
        if (sum) std::fill(sum, sum + 2 * d, 0.0f);
        kernel(args, i * chunk, std::min(rows, (i + 1) * chunk), sum, sum ? sum + d : nullptr);
      }
    };
    if (rows * d <= kGrain) {
      run(0, chunks);
    } else {
      torch::stable::parallel_for(0, chunks, 1 + kGrain / 2 / (chunk * d), run);
    }
  });
  if (!partials) return {dresidual, dx, dweight, dbias};
  dispatch(dtype, [&](auto w) {
    using W = decltype(w);
    const auto add = sum_partials<W>.best();
    torch::stable::parallel_for(0, d, 1 + kGrain / (chunks + 1), [&](int64_t begin, int64_t end) {
      if (weight_grad) add(sums, chunks, 2 * d, mutable_data<W>(dweight), begin, end);
      if (bias_grad) add(sums + d, chunks, 2 * d, mutable_data<W>(dbias), begin, end);
    });
  });
  return {dresidual, dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&forward));
  m.impl("add_layer_norm_forward", TORCH_BOX(&add_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace llmos
