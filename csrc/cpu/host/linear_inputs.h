// The inputs of a linear layer as kernel arguments, and the forward as a function of these.
#pragma once

#include "../linear.h"
#include "common.h"

namespace llmos {

// A matrix that a GEMM can read: the stride of rows or of columns is 1.
struct Operand {
  Tensor tensor;
  int64_t row_stride, column_stride;

  explicit Operand(const Tensor& t)
      : tensor(has_unit_stride(t) ? t : torch::stable::contiguous(t)),
        row_stride(1),
        column_stride(1) {
    if (is_contiguous_along(tensor, 1))
      row_stride = tensor.size(0) == 1 ? tensor.size(1) : tensor.stride(0);
    else
      column_stride = tensor.stride(1);
  }

  static bool is_contiguous_along(const Tensor& t, int64_t dim) {
    return t.stride(dim) == 1 || t.size(dim) == 1;
  }
  static bool has_unit_stride(const Tensor& t) {
    return is_contiguous_along(t, 0) || is_contiguous_along(t, 1);
  }

  template <class T>
  Matrix<T> of() const {
    return {data<T>(tensor), row_stride, column_stride};
  }
};

inline Epilogue epilogue(int64_t activation, double dropout_p, const Optional& seed) {
  return {Activation(activation), dropout_of(dropout_p, seed)};
}

// Return true if a GEMV computes the forward. It reads a contiguous input.
inline bool uses_gemv(int64_t rows, int64_t inner) { return rows <= kGemvMaxRows && inner > 0; }

// Compute the forward of a linear layer whose output is not empty.
template <class T>
void run_linear(const LinearForwardArgs<T>& args);

}  // namespace llmos
