// What the loops of linear layers are given; the formulas stand in llmos_kernels/ops/linear.py.
#pragma once

#include <cstdint>

#include "isa_table.h"
#include "dropout.h"
#include "task_kernel.h"

namespace llmos {

// The places in NAMES of llmos_kernels/ops/activations.py.
enum class Activation : int64_t { None, Relu, Relu2, Gelu, GeluTanh, Silu };

// Element [i][j] of a matrix: distances in elements.
template <class T>
struct Matrix {
  const T* data = nullptr;
  int64_t row = 0, column = 0;

  const T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// Rows that are finished at a time, and whose column sums are added up apart.
constexpr int64_t kChunkRows = 480;

// Rows of a block of a product; as elements of 16 bits they fill whole lines of the cache.
constexpr int64_t kBlockRows = 96;
static_assert(kChunkRows % kBlockRows == 0);

// What follows a product: y = dropout(activation(z)), or its derivative.
struct Epilogue {
  Activation activation;
  Dropout dropout;
};

// Rows [begin, end) of a product's left operand against columns [first, first + columns) of the
// right one.
struct ProductTask {
  int64_t first, columns, begin, end;
};

// out [rows][outer] from input [rows][inner] and weight [outer][inner]. Of the two the one that is
// packed by panels is the weight, or, `turned`, the input.
template <class T>
struct LinearForward {
  using Task = ProductTask;
  Matrix<T> input, weight;
  const T* bias;  // Null, or [outer].
  T *out, *kept;  // Contiguous; kept may be null.
  int64_t rows, inner, outer;
  Epilogue epilogue;
  bool turned;
};

// The same for at most kFewRows rows, of a weight stored by rows: task begin and end are columns of
// out.
template <class T>
struct LinearFew : LinearForward<T> {};

// And of a weight stored by columns, of which only those in `index` are read: x [count][rows] are
// the elements of input there.
template <class T>
struct LinearColumns : LinearForward<T> {
  const int32_t* index;
  const float* x;
  int64_t count;
};

constexpr int64_t kFewRows = 4;

// Below it packing the weight costs more than turning sums.
constexpr int64_t kTurnedRows = 256;

// dinput [rows][inner] from dout [rows][outer] and weight [outer][inner].
template <class T>
struct LinearDinput {
  using Task = ProductTask;
  Matrix<T> dout, weight;
  const T* kept;  // Null, or [rows][inner].
  T* dinput;
  float* sums;  // Null, or [chunk of rows][inner]: column sums.
  int64_t rows, inner, outer;
  Epilogue epilogue;
};

// dweight [outer][inner] from dout [rows][outer] and input [rows][inner].
template <class T>
struct LinearDweight {
  using Task = ProductTask;
  Matrix<T> dout, input;
  T *dweight, *dbias;  // dbias may be null.
  int64_t rows, inner, outer;
};

// Elements [begin, end) of rows of y, or of the gradient of z.
template <class T>
struct Elementwise {
  using Task = ProductTask;
  const T *dout, *kept;  // dout null: forward.
  T* to;
  int64_t columns;
  Epilogue epilogue;
};

}  // namespace llmos
