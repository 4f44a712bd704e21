// The row loops of layer normalisation; the formulas stand in llmos_kernels/ops/layer_norm.py.
#pragma once

#include <cstdint>

#include "isa_table.h"
#include "dropout.h"

namespace llmos {

// T is the element type of activations; weight and bias are float.
template <class T>
struct NormForward {
  const T* x;
  const T* residual = nullptr;  // Null: h is x, and neither h nor dropout is used.
  int64_t x_stride, residual_stride = 0;
  const float* weight;  // Null: ones.
  const float* bias;    // Null: zeros.
  T* y;
  T* h = nullptr;
  float* mean;  // Null: RMS normalisation, whose mean is 0.
  float* rstd;
  int64_t d;
  float eps;
  Dropout dropout = {};
};

template <class T>
struct NormBackward {
  const T* dy;
  const T* dh = nullptr;  // Null: zeros.
  const T* h;
  int64_t dy_stride, dh_stride = 0, h_stride;
  const float* weight;
  const float* mean;
  const float* rstd;
  T* dresidual;
  T* dx = nullptr;  // Null: no dropout, so dx is dresidual.
  int64_t d;
  Dropout dropout = {};
};

// Rows [begin, end). scratch [d] holds a row as float.
template <class T>
using NormForwardRows = void (*)(const NormForward<T>&, int64_t begin, int64_t end, float* scratch);

// Rows [begin, end); adds their weight and bias gradients to dweight and dbias [d], both or neither
// null.
template <class T>
using NormBackwardRows = void (*)(const NormBackward<T>&, int64_t begin, int64_t end,
                                  float* dweight, float* dbias);

// out[c] = sum of partial[r * stride + c] over r, for c in [begin, end).
template <class T>
using SumPartials = void (*)(const float* partial, int64_t rows, int64_t stride, T* out,
                             int64_t begin, int64_t end);

template <class T>
using ToFloat = void (*)(const T* from, float* to, int64_t n);

template <class T>
inline Dispatch<NormForwardRows<T>> norm_forward;
template <class T>
inline Dispatch<NormBackwardRows<T>> norm_backward;
template <class T>
inline Dispatch<SumPartials<T>> sum_partials;
template <class T>
inline Dispatch<ToFloat<T>> to_float;

}  // namespace llmos
