// What the loops of int8 products are given; the formulas stand in llmos_kernels/ops/int8.py.
#pragma once

#include "linear.h"

namespace llmos {

// out [rows][outer] from input [rows][inner] and weight [outer][inner], both stored by rows. As in
// LinearForward the weight is packed, or, `turned`, the input.
template <class T>
struct Int8Product {
  using Task = ProductTask;
  Matrix<int8_t> input, weight;
  const float *input_scale, *weight_scale;  // [rows], [outer].
  const int32_t* offsets;                   // Int8Offsets of the left operand; null with few rows.
  const T* bias;                            // Null, or [outer].
  T *out, *kept;                            // kept is null.
  int64_t rows, inner, outer;
  Epilogue epilogue;
  bool turned;
};

// The same for at most kFewRows rows: task begin and end are columns of out.
template <class T>
struct Int8Few : Int8Product<T> {};

// Of each row of the left operand, what the sums of its products are too high.
struct Int8Offsets {
  using Task = ProductTask;
  Matrix<int8_t> left;
  int32_t* offsets;
  int64_t inner;
};

// Rows of int8 and their scales from rows of input, in one piece each.
template <class T>
struct Int8Rows {
  using Task = ProductTask;
  const T* input;
  int64_t step;  // Between rows of input.
  int8_t* rows;
  float* scale;
  int64_t columns;
};

}  // namespace llmos
