// Arguments of the int8 kernels: quantization of rows, and linear layers with an int8 weight.
//
//     out[i][j] = activation(input_scale[i] * weight_scale[j] * s[i][j] + bias[j]),
//     s[i][j] = sum over k of input[i][k] weight[j][k]
//
// llmos_kernels/ops/int8.py has the reference. vpdpbusd multiplies uint8 by int8, so the weight's
// VNNI layout has uint8 = int8 + 128 (zero point 128). With VNNI, 128 times the sum of the other
// operand is subtracted from the result: the zero-point correction. Without it, kernels undo the
// zero point as they read the weight (kernels/int8_product.h).
#pragma once

#include "linear.h"

namespace llmos {

// Packs a weight [outer][inner] into VNNI layout, the same for every ISA: micro-panels of 64
// columns of out, [micro-panel][word][column]. A word has 32 bits: four elements, with their zero
// point, that follow each other in a row of the weight.
struct Int8VnniWeightArgs {
  using Task = GemmTask;  // [begin, end) are micro-panels.
  Matrix<int8_t> weight;
  void* vnni_weight;
  int64_t inner, outer;
};

// Input columns with outliers, which are multiplied in float32: values [row][count] holds them
// unquantized.
struct Int8Outliers {
  const int32_t* index = nullptr;
  const float* values = nullptr;
  int64_t count = 0;
};

// GEMM: out [rows][outer] from int8 rows and a weight in VNNI layout.
template <class T>
struct Int8GemmArgs {
  using Task = GemmTask;
  Matrix<int8_t> input;
  const void* vnni_weight;
  const float *input_scale, *weight_scale;  // [rows] and [outer].
  // Zero-point corrections of the weight, [rows]; unused without VNNI.
  const int32_t* row_corrections;
  // Zero-point corrections of a uint8 input, [outer]; null for an int8 input.
  const int32_t* column_corrections;
  Int8Outliers outliers;
  const T* bias;            // [outer], or null.
  T *out, *pre_activation;  // pre_activation is always null.
  int64_t rows, inner, outer;
  Epilogue epilogue;
};

constexpr int64_t kInt8GemvMaxRows = 16;

// The same as a GEMV, for at most kInt8GemvMaxRows rows and a weight in its plain layout. Tasks are
// ranges of columns of out.
template <class T>
struct Int8GemvArgs : Int8GemmArgs<T> {
  Matrix<int8_t> weight;
};

// Weight-only quantization: out from at most kInt8GemvMaxRows rows of T and an int8 weight. Tasks
// are ranges of columns of out.
template <class T>
struct Int8WeightOnlyArgs {
  using Task = GemmTask;
  Matrix<T> input;
  Matrix<int8_t> weight;
  const float* weight_scale;
  const T* bias;
  T *out, *pre_activation;
  int64_t rows, inner, outer;
  Epilogue epilogue;
};

// Zero-point correction, 128 * sum(row), of each row: the other operand is stored as uint8 = int8 +
// 128.
struct Int8ZeroPointArgs {
  using Task = GemmTask;
  Matrix<int8_t> rows;
  int32_t* row_corrections;
  int64_t columns;
};

// Quantizes rows of input, whose elements are contiguous, to int8 rows and their scales.
//
// With a column_mask, outlier columns are found and left out in two passes. The first, with
// outlier_count 0, clears the mask of each column that has a magnitude of `threshold` or more. If
// there are such columns, the second pass quantizes their elements as 0 and copies them to
// outlier_values.
template <class T>
struct Int8QuantizeArgs {
  using Task = GemmTask;
  const T* input;
  int64_t row_stride;
  int8_t* quantized;
  float* scale;
  float max_level;           // 127, or 255 for rows without negative elements, which become uint8.
  int32_t* row_corrections;  // Zero-point corrections of the quantized rows, or null.
  uint32_t* column_mask;     // [columns], null or all bits set at first.
  float threshold;
  const int32_t* outlier_index;  // [outlier_count]; outlier_values is [row][outlier_count].
  float* outlier_values;
  int64_t outlier_count, columns;
};

}  // namespace llmos
