// What the loops of int8 products are given; the formulas stand in llmos_kernels/ops/int8.py.
#pragma once

#include "linear.h"

namespace llmos {

// A weight [outer][inner] as products of the CPU level in use read it: strips of columns of out,
// [strip][unit][column], where a unit is the next few elements of one row.
struct Int8Pack {
  using Task = ProductTask;  // Strips [begin, end).
  Matrix<int8_t> weight;
  void* packed;
  int64_t inner, outer;
};

// Columns of input that are not int8: x [row][count] are their elements, as they came.
struct Int8Outliers {
  const int32_t* index = nullptr;
  const float* x = nullptr;
  int64_t count = 0;
};

// out [rows][outer] from rows of int8 and a packed weight.
template <class T>
struct Int8Product {
  using Task = ProductTask;
  Matrix<int8_t> input;
  const void* packed;
  const float *input_scale, *weight_scale;  // [rows], [outer].
  const int32_t* offsets;                   // [rows], Int8Offsets: the packed weight is too high.
  const int32_t* zeros;                     // Null, or [outer]: what sums are too low.
  Int8Outliers outliers;
  const T* bias;  // Null, or [outer].
  T *out, *kept;  // kept is null.
  int64_t rows, inner, outer;
  Epilogue epilogue;
};

constexpr int64_t kFewWithInt8 = 16;

// The same for at most kFewWithInt8 rows and a weight that is not packed: task begin and end are
// columns of out.
template <class T>
struct Int8Few : Int8Product<T> {
  Matrix<int8_t> weight;
};

// out of at most kFewWithInt8 rows of T and a weight of int8.
template <class T>
struct Int8Weight {
  using Task = ProductTask;
  Matrix<T> input;
  Matrix<int8_t> weight;
  const float* weight_scale;
  const T* bias;
  T *out, *kept;
  int64_t rows, inner, outer;
  Epilogue epilogue;
};

// Of each row 128 times its sum: what products with elements that are 128 too high are too high.
struct Int8Offsets {
  using Task = ProductTask;
  Matrix<int8_t> rows;
  int32_t* offsets;
  int64_t columns;
};

// Rows of int8 and their scales from rows of input, in one piece each. With `keep` it is done
// twice: first, with a count of 0, keep [columns] is cleared in columns with a magnitude of the
// threshold or more; then, if there are such columns, they are 0 in the rows and come in x.
template <class T>
struct Int8Rows {
  using Task = ProductTask;
  const T* input;
  int64_t step;
  int8_t* rows;
  float* scale;
  float levels;      // 127, or 255: of rows without negative elements, as uint8.
  int32_t* offsets;  // Null, or as of Int8Offsets.
  uint32_t* keep;    // Null, or all bits of each column.
  float threshold;
  const int32_t* index;  // [count], and x [row][count].
  float* x;
  int64_t count, columns;
};

}  // namespace llmos
