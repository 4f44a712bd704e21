// Arguments of the kernels of linear layers.
//
//     forward:   z = input weight^T + bias,   y = dropout(activation(z))
//     backward:  dz = dy f activation'(z),    with the dropout factors f (0 or 1 / (1 - p))
//                dinput = dz weight,   dweight = dz^T input,   dbias = sum of dz over rows
//
// z is rounded to the element type before the activation; sums are float32. `rows` counts rows of
// input, `inner` is the length of an input row (the depth of the forward GEMM), `outer` the length
// of an output row.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "dropout.h"
#include "isa_table.h"
#include "task_kernel.h"

namespace llmos {

// A matrix with any strides, counted in elements.
template <class T>
struct Matrix {
  const T* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;

  const T* at(int64_t i, int64_t j) const { return data + i * row_stride + j * column_stride; }
};

// Rows of a result whose float32 sums are in scratch memory at a time. dinput sums its columns over
// each such chunk: the partial sums do not depend on the number of threads.
constexpr int64_t kChunkRows = 480;

// Rows of the left operand that a GEMM handles at a time. A column of so many 16-bit elements fills
// whole cache lines.
constexpr int64_t kBlockRows = 96;
static_assert(kChunkRows % kBlockRows == 0);

// What is applied to the result of a GEMM before it is stored: y = dropout(activation(z)), or the
// derivative of this.
struct Epilogue {
  Activation activation;
  Dropout dropout;
};

// One task of a GEMM: rows [begin, end) of the left operand times columns [first_column,
// first_column + columns) of the right operand. For other kernels [begin, end) are the rows or
// columns of the output that the kernel's arguments name.
struct GemmTask {
  int64_t first_column, columns, begin, end;
};

// Forward: out [rows][outer] from input [rows][inner] and weight [outer][inner]. If `transposed`,
// the GEMM computes out^T = weight input^T: it packs panels of the input instead of the weight, and
// transposes its sums before the epilogue.
template <class T>
struct LinearForwardArgs {
  using Task = GemmTask;
  Matrix<T> input, weight;
  const T* bias;            // [outer], or null.
  T *out, *pre_activation;  // Contiguous. pre_activation (z) may be null.
  int64_t rows, inner, outer;
  Epilogue epilogue;
  bool transposed;
  const void* panels = nullptr;  // The weight as LinearPanelsArgs describes it, or null.
};

// A copy of the weight in the order in which the forward reads it: [micro-panel][word of
// inner][column of the micro-panel]. Tasks are micro-panels.
template <class T>
struct LinearPanelsArgs {
  using Task = GemmTask;
  Matrix<T> weight;
  void* panels;
  int64_t inner, outer;
};

// The bytes of such a copy.
template <class T>
inline IsaTable<int64_t (*)(int64_t inner, int64_t outer)> panel_bytes;

// The same as a GEMV, for at most kGemvMaxRows rows and a weight with contiguous rows. Tasks are
// ranges of columns of out.
template <class T>
struct LinearGemvArgs : LinearForwardArgs<T> {};

// The same for a weight with contiguous columns, of which the GEMV reads only those that some row
// multiplies by a non-zero input: `index` [count] names them, x [count][rows] holds their inputs.
template <class T>
struct LinearSparseGemvArgs : LinearForwardArgs<T> {
  const int32_t* index;
  const float* x;
  int64_t count;
};

constexpr int64_t kGemvMaxRows = 4;

// Below this many rows, packing the weight costs more than transposing the sums.
constexpr int64_t kTransposedBelowRows = 256;

// Input gradient: dinput [rows][inner] from dout [rows][outer] and weight [outer][inner]. With
// `saved`, the epilogue multiplies by f activation'(saved): this continues into the layer before.
template <class T>
struct LinearDinputArgs {
  using Task = GemmTask;
  Matrix<T> dout, weight;
  // Saved activation of the layer before, [rows][inner]: y for relu, else z. Null: no epilogue.
  const T* saved;
  T* dinput;
  // Column sums of dinput for each chunk of kChunkRows rows, [chunk][inner]. Null: not wanted.
  float* sums;
  int64_t rows, inner, outer;
  Epilogue epilogue;
};

// Weight gradient: dweight [outer][inner] from dout [rows][outer] and input [rows][inner].
template <class T>
struct LinearDweightArgs {
  using Task = GemmTask;
  Matrix<T> dout, input;
  T *dweight, *dbias;  // dbias may be null.
  int64_t rows, inner, outer;
};

// The activation without a GEMM: y from z, or dz from dy. Tasks are ranges of rows.
template <class T>
struct ActivationArgs {
  using Task = GemmTask;
  const T *dout, *saved;  // dout is dy, null in the forward. saved is z, or y for relu's backward.
  T* to;
  int64_t columns;
  Epilogue epilogue;
};

}  // namespace llmos
