// The product of one to four rows, mostly zeros, with a weight that is stored by columns: columns
// for which all rows are zero are not read. It follows relu in the decoding of tokens.
#include <tuple>

#include "activations.h"
#include "choice.h"
#include "list_where.h"

namespace llmos {
namespace {

constexpr int kMostRows = 4;
constexpr int kThreads = 128;
// Columns of the weight that a block looks at; blocks leave their sums, which are added in order.
constexpr int kColumns = 256;

template <class T>
struct SparseArgs {
  const T* input;
  int64_t input_stride;
  const T* weight;  // Element [o][k] is at o + k * column_stride.
  int64_t column_stride;
  const T* bias;   // Null: zeros.
  float* partial;  // [parts][rows][outer]
  T* out;
  int64_t rows, inner, outer, parts;
  Activation activation;
};

// Add up the columns of one part that are needed, in packs of kPack outputs for each thread.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) sparse_kernel(SparseArgs<T> a) {
  __shared__ Shared<int, kColumns> columns;
  __shared__ Shared<float, kMostRows * kColumns> values;
  const int64_t first = int64_t(blockIdx.y) * kColumns;
  const int64_t here = a.inner - first < kColumns ? a.inner - first : kColumns;
  const T* input = a.input + first;
  const auto is_needed = [&](int64_t k) {
    bool any = false;
    for (int64_t r = 0; r < a.rows; ++r)
      any |= float(load_global<T>(input + r * a.input_stride + k)) != 0;
    return any;
  };
  const int needed = list_where(here, is_needed, [&](int i, int64_t k) {
    columns[i] = int(k);
#pragma unroll
    for (int r = 0; r < kMostRows; ++r)
      values[r * kColumns + i] =
          r < a.rows ? float(load_global<T>(input + r * a.input_stride + k)) : 0.0f;
  });
  const int64_t output = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kPack;
  if (output >= a.outer) return;
  float sums[kMostRows][kPack] = {};
#pragma unroll 4
  for (int i = 0; i < needed; ++i) {
    float w[kPack];
    load(a.weight + (first + int(columns[i])) * a.column_stride + output, w);
#pragma unroll
    for (int r = 0; r < kMostRows; ++r) {
      const float x = values[r * kColumns + i];
#pragma unroll
      for (int c = 0; c < kPack; ++c) sums[r][c] += x * w[c];
    }
  }
#pragma unroll
  for (int r = 0; r < kMostRows; ++r)
    if (r < a.rows)
      store_rounded(a.partial + (blockIdx.y * a.rows + r) * a.outer + output, sums[r]);
}

// Add the sums of all parts, one output for each thread.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(SparseArgs<T> a) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = blockIdx.y;
  if (column >= a.outer) return;
  float z = 0;
  for (int64_t part = 0; part < a.parts; ++part)
    z += load_global<float>(a.partial + (part * a.rows + row) * a.outer + column);
  if (a.bias) z += float(load_global<T>(a.bias + column));
  store_global(a.out + row * a.outer + column, T(activate(a.activation, float(T(z)))));
}

std::tuple<Tensor, Tensor> forward(const Tensor& input_, const Tensor& weight,
                                   const Optional& bias_, int64_t activation, double,
                                   const Optional&, bool) {
  const int64_t rows = input_.size(0), inner = input_.size(1), outer = weight.size(0);
  Tensor out = output(input_, {rows, outer}, input_.scalar_type());
  const Tensor z = output(input_, {0}, input_.scalar_type());
  if (out.numel() == 0) return {out, z};
  const int64_t parts = divided_up(inner, kColumns);
  const Tensor partial = output(input_, {parts, rows, outer}, ScalarType::Float);
  const RowView input(input_, inner);
  Optional bias;
  if (bias_) bias = llmos::contiguous(*bias_);
  const Device device(input_);
  for_dtype(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const SparseArgs<T> args{data<T>(*input.tensor),
                             input.stride,
                             data<T>(weight),
                             weight.stride(1),
                             bias ? data<T>(*bias) : nullptr,
                             mutable_data<float>(partial),
                             mutable_data<T>(out),
                             rows,
                             inner,
                             outer,
                             parts,
                             Activation(activation)};
    constexpr int kPack = kWidest / int(sizeof(T));
    const int64_t bytes = sizeof(T);
    const auto blocks = [&](int pack) {
      return dim3(unsigned(divided_up(outer, pack * kThreads)), unsigned(parts));
    };
    if (parts == 0) {  // No inputs: out is the bias.
    } else if (is_aligned({args.weight, args.partial},
                          {args.column_stride * bytes, outer * bytes, outer * 4})) {
      device.launch(sparse_kernel<T, kPack>, blocks(kPack), dim3(kThreads), args);
    } else {
      device.launch(sparse_kernel<T, 1>, blocks(1), dim3(kThreads), args);
    }
    device.launch(sum_parts_kernel<T>, dim3(unsigned(divided_up(outer, kThreads)), unsigned(rows)),
                  dim3(kThreads), args);
  });
  return {out, z};
}

// Return true for few rows and a weight that is stored by columns, without dropout and where z is
// not saved.
bool is_sparse(const StableIValue* stack) {
  using torch::stable::detail::to;
  int64_t rows = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(to<AtenTensorHandle>(stack[0]), 0, &rows));
  if (rows > kMostRows) return false;
  const auto weight = to<AtenTensorHandle>(stack[1]);
  int64_t down = 0, across = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_stride(weight, 0, &down));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_stride(weight, 1, &across));
  return down == 1 && across > 1 && to<double>(stack[4]) == 0 && !to<bool>(stack[6]);
}

Choice choose_linear_forward("linear_forward", kMostRows, -1, kNoLimit, is_sparse);

}  // namespace

LLMOS_CUDA_OPS(m) { own<choose_linear_forward, &forward>(m); }

}  // namespace llmos
