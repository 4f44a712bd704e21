// Kernels for LayerNorm and RMSNorm, fused with a residual and dropout;
// llmos_kernels/ops/layer_norm.py has the formulas.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "isa_table.h"

namespace llmos {

// T is the element type of the activations; weight and bias are converted to float32.
template <class T>
struct NormForwardArgs {
  const T* x;
  const T* residual = nullptr;  // Null: h is x; the h below and dropout are not used.
  int64_t x_stride, residual_stride = 0;
  const float* weight;  // Null: ones.
  const float* bias;    // Null: zeros.
  T* y;
  T* h = nullptr;
  float* mean;  // Null: RMSNorm, which does not subtract a mean.
  float* rstd;
  int64_t d;
  float eps;
  Dropout dropout = {};
};

template <class T>
struct NormBackwardArgs {
  const T* dy;
  const T* dh = nullptr;  // Null: zeros.
  const T* h;
  int64_t dy_stride, dh_stride = 0, h_stride;
  const float* weight;
  const float* mean;
  const float* rstd;
  T* dresidual;
  T* dx = nullptr;  // Null: no dropout, so dx equals dresidual.
  int64_t d;
  Dropout dropout = {};
};

// Normalise rows [begin, end). scratch [d] holds one row as float32.
template <class T>
using NormForwardFn = void (*)(const NormForwardArgs<T>&, int64_t begin, int64_t end,
                               float* scratch);

// Compute dresidual and dx for rows [begin, end), and adds their weight and bias gradients to
// dweight and dbias [d], which are both null or both not.
template <class T>
using NormBackwardFn = void (*)(const NormBackwardArgs<T>&, int64_t begin, int64_t end,
                                float* dweight, float* dbias);

// out[c] = sum over r of partial[r * stride + c], for c in [begin, end).
template <class T>
using SumPartialsFn = void (*)(const float* partial, int64_t rows, int64_t stride, T* out,
                               int64_t begin, int64_t end);

template <class T>
using ToFloatFn = void (*)(const T* from, float* to, int64_t n);

// sum[i] += addend[i].
template <class T>
using AddToFn = void (*)(const T* addend, T* sum, int64_t n);

template <class T>
inline IsaTable<NormForwardFn<T>> norm_forward;
template <class T>
inline IsaTable<NormBackwardFn<T>> norm_backward;
template <class T>
inline IsaTable<SumPartialsFn<T>> sum_partials;
template <class T>
inline IsaTable<ToFloatFn<T>> to_float;
template <class T>
inline IsaTable<AddToFn<T>> add_to;

}  // namespace llmos
