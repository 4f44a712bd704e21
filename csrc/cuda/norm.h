// Arguments of the LayerNorm and RMSNorm kernels; llmos_kernels/ops/layer_norm.py has the formulas.
#pragma once

#include "choice.h"
#include "row.h"

namespace llmos {

// T is the element type of the activations, W that of weight and bias.
template <class T, class W>
struct NormArgs {
  const T* x;
  const T* residual;  // Null: h is x; the h below and dropout are not used.
  int64_t x_stride, residual_stride;
  const W* weight;  // Null: ones.
  const W* bias;    // Null: zeros.
  int64_t rows, d;
  bool center;
  float eps;
  T* y = nullptr;
  T* h = nullptr;
  int8_t* quantized = nullptr;  // Null: y is written, and statistics; else this and scale.
  float* scale = nullptr;
  float* mean = nullptr;  // Null: RMSNorm, or no statistics are wanted.
  float* rstd = nullptr;
  Dropout dropout = {};
};

// Return (v - mean) * rstd * weight + bias of the kPack elements at `at`, rounded to T.
template <class T, class W, int kPack>
LLMOS_DEVICE void scale_and_shift(const float (&v)[kPack], const Moments& moments, const W* weight,
                                  const W* bias, int64_t at, T (&y)[kPack]) {
  float z[kPack], w[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) z[i] = (v[i] - moments.mean) * moments.rstd;
  if (weight) {
    load(weight + at, w);
#pragma unroll
    for (int i = 0; i < kPack; ++i) z[i] *= w[i];
  }
  if (bias) {
    load(bias + at, w);
#pragma unroll
    for (int i = 0; i < kPack; ++i) z[i] += w[i];
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) y[i] = T(z[i]);
}

// Compute one row, in packs of kPack elements. Without "1 block" nvcc 13.0 spills on sm_100.
template <class T, class W, int kPack, bool kQuantized>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_kernel(NormArgs<T, W> a) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= a.rows) return;  // A whole warp: nobody waits for it.
  const T* x = a.x + index * a.x_stride;
  const T* residual = a.residual ? a.residual + index * a.residual_stride : nullptr;
  T* h = a.residual ? a.h + index * a.d : nullptr;
  const Mask mask(a.dropout);

  const auto read = [&](int64_t at, float (&v)[kPack]) {
    load(x + at, v);
    if (!residual) return;
    if (a.dropout.seed) {
      mask.apply(index, at, v);
#pragma unroll
      for (int i = 0; i < kPack; ++i) v[i] = float(T(v[i]));
    }
    float r[kPack];
    load(residual + at, r);
#pragma unroll
    for (int i = 0; i < kPack; ++i) v[i] += r[i];
    store_rounded(h + at, v);
  };
  const auto again = [&](int64_t at, float (&v)[kPack]) { load((residual ? h : x) + at, v); };
  Row<kPack> row(a.d);
  const Moments moments = moments_of(row, read, again, a.center, a.eps);
  if (threadIdx.x == 0) {
    if (a.mean) store_global(a.mean + index, moments.mean);
    if (a.rstd) store_global(a.rstd + index, moments.rstd);
  }
  // Call body(at, y) for each pack.
  const auto each = [&](auto body) {
    row.each(again, [&](int64_t at, const float (&v)[kPack]) {
      T y[kPack];
      scale_and_shift(v, moments, a.weight, a.bias, at, y);
      body(at, y);
    });
  };
  if constexpr (kQuantized) {
    const auto widened = [&](auto body) {
      each([&](int64_t at, const T(&y)[kPack]) {
        float wide[kPack];
#pragma unroll
        for (int i = 0; i < kPack; ++i) wide[i] = float(y[i]);
        body(at, wide);
      });
    };
    quantize_row<kPack>(widened, a.quantized + index * a.d, a.scale + index);
  } else {
    each([&](int64_t at, const T(&y)[kPack]) { store_raw(a.y + index * a.d + at, y); });
  }
}

// A weight or bias of d elements, made contiguous where it is not.
struct NormParameter {
  Optional dense;

  NormParameter(const Optional& t, int64_t d) {
    if (!t) return;
    STD_TORCH_CHECK(t->numel() == d, "layer_norm: expected a weight or bias of ", d,
                    " elements, got ", t->numel());
    dense = llmos::contiguous(*t);
  }

  template <class W>
  const W* of() const {
    return dense ? data<W>(*dense) : nullptr;
  }
};

// What a norm is computed of, checked; there is at least one row.
struct NormInputs {
  RowView x, residual;
  NormParameter weight, bias;
  bool has_residual, center;
  int64_t rows, d;
  double eps;

  NormInputs(const Tensor& x_, const Tensor* residual_, const Optional& weight_,
             const Optional& bias_, int64_t d, double eps, bool center)
      : x(x_, d),
        residual(residual_ ? *residual_ : x_, d),
        weight(weight_, d),
        bias(bias_, d),
        has_residual(residual_),
        center(center),
        rows(x_.numel() / d),
        d(d),
        eps(eps) {}

  // Return the arguments of the kernel, without its results.
  template <class T, class W>
  NormArgs<T, W> of() const {
    return {data<T>(*x.tensor),
            has_residual ? data<T>(*residual.tensor) : nullptr,
            x.stride,
            residual.stride,
            weight.of<W>(),
            bias.of<W>(),
            rows,
            d,
            center,
            float(eps)};
  }
};

// Run the kernel on rows of an input and, unless it is null, a residual.
template <bool kQuantized, class T, class W>
void launch_norm(const Device& device, const NormArgs<T, W>& args) {
  constexpr int kPack = kWidest / int(sizeof(T));
  const int64_t bytes = sizeof(T);
  const bool is_wide =
      is_aligned({args.x, args.residual, args.weight, args.bias, args.y, args.h, args.quantized},
                 {args.d * bytes, args.x_stride * bytes, args.residual_stride * bytes});
  const RowGrid grid(args.rows, args.d, kPreferred);
  if (is_wide)
    return device.launch(norm_kernel<T, W, kPack, kQuantized>, grid.grid, grid.block, args);
  device.launch(norm_kernel<T, W, 1, kQuantized>, grid.grid, grid.block, args);
}

// Call body(T{}, W{}) with the element types of activations and parameters.
template <class Body>
void for_dtypes(ScalarType dtype, const Optional& weight, const Optional& bias, Body body) {
  const ScalarType given = weight ? weight->scalar_type() : bias ? bias->scalar_type() : dtype;
  STD_TORCH_CHECK(given == dtype || given == ScalarType::Float,
                  "layer_norm: weight and bias must be float32 or of the dtype of input");
  STD_TORCH_CHECK(!bias || bias->scalar_type() == given,
                  "layer_norm: weight and bias must have one dtype");
  for_dtype(dtype, [&](auto t) {
    if (given == dtype) return body(t, t);
    body(t, float{});
  });
}

}  // namespace llmos
