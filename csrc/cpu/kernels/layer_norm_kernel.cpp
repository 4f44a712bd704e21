// The LayerNorm and RMSNorm kernels, one row at a time.
#include "../layer_norm.h"

#include <cmath>
#include <type_traits>

#include "philox.h"
#include "vec.h"

namespace llmos {
namespace {

template <class T>
constexpr bool is_float = std::is_same_v<T, float>;

// Compute h = residual + dropout(x), rounded to T where torch rounds, and calls body(part, i, h)
// for each element.
template <class T, class Body>
[[gnu::always_inline]] inline void add_residual(const T* x, const T* residual, T* h,
                                                const Dropout& dropout, int64_t row, int64_t d,
                                                Sum& sum, Body body) {
  if (!dropout.threshold) {
    const auto visit = [&](auto part, int64_t i) {
      using V = typename decltype(part)::V;
      body(part, i, store_rounded(h + i, load<V>(residual + i) + load<V>(x + i)));
    };
    return sweep_sums(d, visit, sum);
  }
  for_each_dropout_block(dropout, row, d, [&](int64_t begin, int64_t count, const float* factors) {
    sweep(count, [&](auto part, int64_t i) {
      using V = typename decltype(part)::V;
      const int64_t at = begin + i;
      const V dropped = store_rounded(h + at, load<V>(x + at) * load<V>(factors + i));
      body(part, at, store_rounded(h + at, load<V>(residual + at) + dropped));
    });
    if ((begin + count) % kFoldEvery == 0) sum.fold();
  });
}

// Return the variance, and correct the mean by the mean of h - mean, so that a constant row has
// variance 0. Also prefetches y and the next row of x.
template <class T>
inline float variance(const float* h, int64_t d, const T* next_x, const T* y, float& mean) {
  Sum error, square;
  const float first = mean;
  const auto visit = [&](auto part, int64_t i) {
    using V = typename decltype(part)::V;
    if constexpr (!is_float<V>) {
      __builtin_prefetch(y + i, 1);
      __builtin_prefetch(next_x + i);
    }
    const V delta = load<V>(h + i) - first;
    error.add(part, delta);
    square.add_product(part, delta, delta);
  };
  sweep_sums(d, visit, error, square);
  const float shift = error.total() / float(d);
  mean += shift;
  const float value = square.total() / float(d) - shift * shift;
  return value < 0 ? 0 : value;
}

template <class T>
void normalize(const float* h, float mean, float rstd, const float* weight, const float* bias, T* y,
               int64_t d) {
  // One loop for each case, without null checks inside.
  const auto run = [&](auto scaled, auto shifted) {
    sweep(d, [&](auto part, int64_t i) {
      using V = typename decltype(part)::V;
      V v = (load<V>(h + i) - mean) * rstd;
      if constexpr (scaled && shifted)
        v = fma(v, load<V>(weight + i), load<V>(bias + i));
      else if constexpr (scaled)
        v *= load<V>(weight + i);
      else if constexpr (shifted)
        v += load<V>(bias + i);
      store(y + i, v);
    });
  };
  if (weight && bias) return run(std::true_type{}, std::true_type{});
  if (weight) return run(std::true_type{}, std::false_type{});
  if (bias) return run(std::false_type{}, std::true_type{});
  run(std::false_type{}, std::false_type{});
}

// Return a row of h as float: h itself, or its copy in scratch. add(part, v) adds its elements to
// sum.
template <class T, class Add>
[[gnu::always_inline]] inline const float* row_of_h(const NormForwardArgs<T>& a, int64_t row,
                                                    float* scratch, Sum& sum, Add add) {
  const T* x = a.x + row * a.x_stride;
  T* h = a.residual ? a.h + row * a.d : nullptr;
  const auto visit = [&](auto part, int64_t i, auto v) {
    if constexpr (!is_float<T>) store(scratch + i, v);
    add(part, v);
  };
  if (a.residual) {
    add_residual(x, a.residual + row * a.residual_stride, h, a.dropout, row, a.d, sum, visit);
  } else {
    const auto load_x = [&](auto part, int64_t i) {
      visit(part, i, load<typename decltype(part)::V>(x + i));
    };
    sweep_sums(a.d, load_x, sum);
  }
  if constexpr (is_float<T>)
    return a.residual ? h : x;
  else
    return scratch;
}

template <class T>
[[gnu::flatten]] void forward(const NormForwardArgs<T>& a, int64_t begin, int64_t end,
                              float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    T* y = a.y + row * a.d;
    Sum sum;
    const float* values;
    float mean = 0, spread;
    if (a.mean) {
      values = row_of_h(a, row, scratch, sum, [&](auto part, auto v) { sum.add(part, v); });
      mean = sum.total() / float(a.d);
      spread = variance(values, a.d, a.x + (row + 1) * a.x_stride, y, mean);
      a.mean[row] = mean;
    } else {
      values =
          row_of_h(a, row, scratch, sum, [&](auto part, auto v) { sum.add_product(part, v, v); });
      spread = sum.total() / float(a.d);
    }
    const float rstd = a.rstd[row] = 1 / std::sqrt(spread + a.eps);
    normalize(values, mean, rstd, a.weight, a.bias, y, a.d);
  }
}

template <class T, bool kWeight, bool kAddDh, bool kWeightGrad>
[[gnu::flatten]] void backward_row(const NormBackwardArgs<T>& a, int64_t row, float* dweight,
                                   float* dbias) {
  // Local copies: the compiler must assume that stores change the members of `a`.
  const int64_t d = a.d;
  const float* weight = a.weight;
  const T* dy = a.dy + row * a.dy_stride;
  const T* dh = kAddDh ? a.dh + row * a.dh_stride : nullptr;
  const T* h = a.h + row * a.h_stride;
  T* dresidual = a.dresidual + row * d;
  const float mean = a.mean ? a.mean[row] : 0, rstd = a.rstd[row];

  Sum sum_g, sum_gx;
  const auto visit = [&](auto part, int64_t i) {
    using V = typename decltype(part)::V;
    V g = load<V>(dy + i);
    const V x_hat = (load<V>(h + i) - mean) * rstd;
    if constexpr (kWeightGrad) {
      store(dweight + i, fma(g, x_hat, load<V>(dweight + i)));
      store(dbias + i, load<V>(dbias + i) + g);
    }
    if constexpr (kWeight) g *= load<V>(weight + i);
    sum_g.add(part, g);
    sum_gx.add_product(part, g, x_hat);
  };
  sweep_sums(d, visit, sum_g, sum_gx);
  const float mean_g = a.mean ? sum_g.total() / float(d) : 0;
  const float mean_gx = sum_gx.total() / float(d);
  sweep(d, [&](auto part, int64_t i) {
    using V = typename decltype(part)::V;
    V g = load<V>(dy + i);
    const V x_hat = (load<V>(h + i) - mean) * rstd;
    if constexpr (kWeight) g *= load<V>(weight + i);
    V v = fma(x_hat, V{} - mean_gx, g - mean_g) * rstd;
    if constexpr (kAddDh) v += load<V>(dh + i);
    store(dresidual + i, v);
  });

  if (!a.dx) return;
  T* dx = a.dx + row * d;
  for_each_dropout_block(a.dropout, row, d, [&](int64_t at, int64_t count, const float* factors) {
    sweep(count, [&](auto part, int64_t i) {
      using V = typename decltype(part)::V;
      store(dx + at + i, load<V>(dresidual + at + i) * load<V>(factors + i));
    });
  });
}

template <class T>
void backward(const NormBackwardArgs<T>& a, int64_t begin, int64_t end, float* dweight,
              float* dbias) {
  const auto run = [&](auto weight, auto add_dh, auto weight_grad) {
    for (int64_t row = begin; row < end; ++row)
      backward_row<T, weight, add_dh, weight_grad>(a, row, dweight, dbias);
  };
  const auto with_dh = [&](auto weight, auto weight_grad) {
    a.dh ? run(weight, std::true_type{}, weight_grad) : run(weight, std::false_type{}, weight_grad);
  };
  const auto with_weight = [&](auto weight_grad) {
    a.weight ? with_dh(std::true_type{}, weight_grad) : with_dh(std::false_type{}, weight_grad);
  };
  dweight ? with_weight(std::true_type{}) : with_weight(std::false_type{});
}

template <class T>
void sum_rows(const float* partial, int64_t rows, int64_t stride, T* out, int64_t begin,
              int64_t end) {
  sweep(end - begin, [&](auto part, int64_t i) {
    using V = typename decltype(part)::V;
    V total = {};
    for (int64_t row = 0; row < rows; ++row) total += load<V>(partial + row * stride + begin + i);
    store(out + begin + i, total);
  });
}

template <class T>
void convert(const T* from, float* to, int64_t n) {
  sweep(n,
        [&](auto part, int64_t i) { store(to + i, load<typename decltype(part)::V>(from + i)); });
}

template <class T>
void add(const T* addend, T* sum, int64_t n) {
  sweep(n, [&](auto part, int64_t i) {
    using V = typename decltype(part)::V;
    store(sum + i, load<V>(addend + i) + load<V>(sum + i));
  });
}

template <class T, bool kRegister = kIsaBenefits<T>>
struct RegisterNormKernels {
  Register<NormForwardFn<T>> forward_{LLMOS_ISA, norm_forward<T>, &forward<T>};
  Register<NormBackwardFn<T>> backward_{LLMOS_ISA, norm_backward<T>, &backward<T>};
  Register<SumPartialsFn<T>> sum_{LLMOS_ISA, sum_partials<T>, &sum_rows<T>};
  Register<ToFloatFn<T>> convert_{LLMOS_ISA, to_float<T>, &convert<T>};
  Register<AddToFn<T>> add_{LLMOS_ISA, add_to<T>, &add<T>};
};
template <class T>
struct RegisterNormKernels<T, false> {};

const RegisterNormKernels<float> register_f32;
const RegisterNormKernels<bf16> register_bf16;
const RegisterNormKernels<f16> register_f16;

}  // namespace
}  // namespace llmos
