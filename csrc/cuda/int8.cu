// Quantization of rows to int8, and products of few rows with an int8 weight: dynamic, of int8 rows
// by dp4a, and weight-only, of float rows with the weight widened in registers.
// llmos_kernels/ops/int8.py and int8_linear.py have the formulas.
#include <tuple>

#include "activations.h"
#include "choice.h"
#include "list_where.h"
#include "row.h"

namespace llmos {
namespace {

template <class T>
struct QuantizeArgs {
  const T* input;
  int64_t stride;
  const uint8_t* outliers;  // [d], 1 for columns that become 0. Null: there are none.
  int8_t* quantized;
  float* scale;
  int64_t rows, d;
};

template <class T, int kPack>
__global__ void __launch_bounds__(kMaxThreads) quantize_kernel(QuantizeArgs<T> a) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= a.rows) return;  // A whole warp: nobody waits for it.
  const auto read = [&](int64_t at, float (&v)[kPack]) {
    load(a.input + index * a.stride + at, v);
    if (!a.outliers) return;
    uint8_t outlier[kPack];
    load_raw(a.outliers + at, outlier);
#pragma unroll
    for (int i = 0; i < kPack; ++i) v[i] = outlier[i] ? 0 : v[i];
  };
  Row<kPack> row(a.d);
  row.read(read, [](const float (&)[kPack]) {});
  quantize_row<kPack>([&](auto body) { row.each(read, body); }, a.quantized + index * a.d,
                      a.scale + index);
}

template <class T>
void quantize(const Device& device, const QuantizeArgs<T>& args) {
  constexpr int kPack = kWidest / int(sizeof(T));
  const int64_t bytes = sizeof(T);
  const RowGrid grid(args.rows, args.d, kPreferred);
  if (is_aligned({args.input, args.outliers, args.quantized},
                 {args.d * bytes, args.stride * bytes}))
    return device.launch(quantize_kernel<T, kPack>, grid.grid, grid.block, args);
  device.launch(quantize_kernel<T, 1>, grid.grid, grid.block, args);
}

std::tuple<Tensor, Tensor> int8_quantize(const Tensor& input_) {
  const int64_t rows = input_.size(0), d = input_.size(1);
  Tensor quantized = output(input_, {rows, d}, ScalarType::Char);
  Tensor scale = output(input_, {rows}, ScalarType::Float);
  if (rows == 0) return {quantized, scale};
  const RowView input(input_, d);
  const Device device(input_);
  for_dtype(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    quantize<T>(device, {data<T>(*input.tensor), input.stride, nullptr,
                         mutable_data<int8_t>(quantized), mutable_data<float>(scale), rows, d});
  });
  return {quantized, scale};
}

// Outlier columns: those in which a row has a magnitude of `threshold` or more.
template <class T>
struct OutlierArgs {
  const T* input;
  int64_t stride, rows, d;
  float threshold;
  uint8_t* outliers;  // [d]: 1 where a column is one.
  int32_t* list;      // [1 + d]: their number, then the columns in order.
};

// One block lists the outliers of few rows.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) outlier_kernel(OutlierArgs<T> a) {
  const auto is_outlier = [&](int64_t column) {
    bool is_one = false;
    for (int64_t r = 0; r < a.rows; ++r)
      is_one |= fabsf(float(load_global<T>(a.input + r * a.stride + column))) >= a.threshold;
    store_global(a.outliers + column, uint8_t(is_one));
    return is_one;
  };
  const int count = list_where(a.d, is_outlier, [&](int i, int64_t column) {
    store_global(a.list + 1 + i, int32_t(column));
  });
  if (threadIdx.x == 0) store_global(a.list, int32_t(count));
}

constexpr int64_t kMostRows = 16;
// Those of a block that reads single elements: it needs more registers for each.
constexpr int kScalarRows = 4;
// Warps of a block, which share the elements of kColumns rows of the weight.
constexpr int kWarps = 4;
constexpr int kColumns = 4;

template <class X>
constexpr bool is_quantized = std::is_same_v<X, int8_t>;

// A uint8 is an int8 and 128, and dp4a takes two int8: the bits of -128 that make one of the other,
// four times.
constexpr int kZeroPoint = int(0x80808080);

// X is the element type of the input, int8_t (also for uint8) or T, and T that of the result.
template <class X, class T>
struct ProductArgs {
  const X* input;
  int64_t input_stride;
  const float* input_scale;  // [rows], of a quantized input.
  const int8_t* weight;      // [outer][inner]
  const float* weight_scale;
  const T* bias;  // Null: zeros.
  T* out;
  int64_t rows, inner, outer;
  Activation activation;
  int zero_point = 0;              // kZeroPoint for uint8.
  const T* unquantized = nullptr;  // The rows before they were quantized, for outlier columns.
  int64_t unquantized_stride = 0;
  const int32_t* outliers = nullptr;  // As OutlierArgs::list. Null: there are none.
};

// Add to sums[r] the products of kPack elements of the weight with those of row first_row + r of
// the input.
template <int kRows, int kPack, class X, class T, class Sum>
LLMOS_DEVICE void multiply(const ProductArgs<X, T>& a, int64_t first_row, int64_t at,
                           const int8_t (&weight)[kColumns][kPack], Sum (&sums)[kRows][kColumns]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first_row + r >= a.rows) break;
    X input[kPack];
    load_raw(a.input + (first_row + r) * a.input_stride + at, input);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if constexpr (is_quantized<X> && kPack % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kPack; i += 4) {
          int x, w;
          std::memcpy(&x, input + i, 4);
          std::memcpy(&w, weight[c] + i, 4);
          sums[r][c] = __dp4a(x ^ a.zero_point, w, sums[r][c]) - __dp4a(a.zero_point, w, 0);
        }
      } else if constexpr (is_quantized<X>) {
        const int x = a.zero_point ? int(uint8_t(input[0])) : int(input[0]);
        sums[r][c] += x * int(weight[c][0]);
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) sums[r][c] += Sum(input[i]) * Sum(weight[c][i]);
      }
    }
  }
}

// Compute kColumns columns of out. The warps of a block take every kWarps-th part of the products;
// their sums are added in order.
template <class X, class T, int kRows, int kPack>
__global__ void __launch_bounds__(kWarps* kWarp, 2) few_rows_kernel(ProductArgs<X, T> a) {
  using Sum = std::conditional_t<is_quantized<X>, int, float>;
  __shared__ Shared<Sum, kWarps * kRows * kColumns> partial;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t column = int64_t(blockIdx.x) * kColumns, first_row = int64_t(blockIdx.y) * kRows;
  Sum sums[kRows][kColumns] = {};
  for (int64_t at = int64_t(threadIdx.x) * kPack; at < a.inner; at += kWarps * kWarp * kPack) {
    int8_t weight[kColumns][kPack] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (column + c < a.outer) load_raw(a.weight + (column + c) * a.inner + at, weight[c]);
    multiply<kRows>(a, first_row, at, weight, sums);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    over_warp(sums[r], [](Sum a, Sum b) { return a + b; });
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (lane == 0) partial[(warp * kRows + r) * kColumns + c] = sums[r][c];
  }
  __syncthreads();
  // A thread has one result.
  const int r = int(threadIdx.x) / kColumns, c = int(threadIdx.x) % kColumns;
  const int64_t row = first_row + r, col = column + c;
  if (r >= kRows || row >= a.rows || col >= a.outer) return;
  Sum sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partial[(w * kRows + r) * kColumns + c];
  float z = float(sum);
  if (is_quantized<X>) z = __fmul_rn(z, load_global<float>(a.input_scale + row));
  if (a.outliers) {
    const int32_t count = load_global<int32_t>(a.outliers);
    float added = 0;
    for (int32_t i = 0; i < count; ++i) {
      const int64_t k = load_global<int32_t>(a.outliers + 1 + i);
      added += float(load_global<T>(a.unquantized + row * a.unquantized_stride + k)) *
               float(load_global<int8_t>(a.weight + col * a.inner + k));
    }
    z += added;
  }
  z = __fmul_rn(z, load_global<float>(a.weight_scale + col));
  if (a.bias) z = __fadd_rn(z, float(load_global<T>(a.bias + col)));
  const float rounded = float(T(z));
  store_global(a.out + row * a.outer + col, T(activate(a.activation, rounded)));
}

template <class X, class T>
void launch_few_rows(const Device& device, const ProductArgs<X, T>& a) {
  const int64_t bytes = sizeof(X);
  const bool is_wide = is_aligned({a.input, a.weight}, {a.inner, a.input_stride * bytes});
  const auto run = [&](auto rows, auto pack) {
    const dim3 grid(unsigned(divided_up(a.outer, kColumns)), unsigned(divided_up(a.rows, rows)));
    device.launch(few_rows_kernel<X, T, rows, pack>, grid, dim3(kWarps * kWarp), a);
  };
  const auto with_rows = [&](auto pack, auto most) {
    if (a.rows == 1) return run(std::integral_constant<int, 1>{}, pack);
    if (a.rows <= kScalarRows) return run(std::integral_constant<int, kScalarRows>{}, pack);
    run(most, pack);
  };
  if (is_wide)
    return with_rows(std::integral_constant<int, 16>{}, std::integral_constant<int, kMostRows>{});
  with_rows(std::integral_constant<int, 1>{}, std::integral_constant<int, kScalarRows>{});
}

// The weight side of a layer, checked.
struct Weight {
  Tensor weight, scale;
  Optional bias;
  int64_t outer, inner;

  Weight(const Tensor& weight_, const Tensor& scale_, const Optional& bias_)
      : weight(llmos::contiguous(weight_)),
        scale(llmos::contiguous(scale_)),
        outer(weight_.size(0)),
        inner(weight_.size(1)) {
    if (bias_) bias = llmos::contiguous(*bias_);
  }

  template <class T>
  const T* bias_of() const {
    return bias ? data<T>(*bias) : nullptr;
  }
};

Tensor int8_weight_only(const Tensor& input_, const Tensor& weight_, const Tensor& scale_,
                        const Optional& bias_, int64_t activation) {
  const int64_t rows = input_.size(0), inner = input_.size(1);
  STD_TORCH_CHECK(rows <= kMostRows, "int8_weight_only: at most ", kMostRows, " rows, got ", rows);
  const Weight weight(weight_, scale_, bias_);
  Tensor out = output(input_, {rows, weight.outer}, input_.scalar_type());
  if (out.numel() == 0) return out;
  const RowView input(input_, inner);
  const Device device(input_);
  for_dtype(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch_few_rows<T, T>(
        device, {data<T>(*input.tensor), input.stride, nullptr, data<int8_t>(weight.weight),
                 data<float>(weight.scale), weight.bias_of<T>(), mutable_data<T>(out), rows, inner,
                 weight.outer, Activation(activation)});
  });
  return out;
}

Tensor int8_matmul(const Tensor& a_, const Tensor& b, const Tensor& a_scale_, const Tensor& b_scale,
                   const Optional&, const Optional& bias_, int64_t activation, ScalarType dtype) {
  const Tensor a = llmos::contiguous(a_), a_scale = llmos::contiguous(a_scale_);
  const int64_t rows = a.size(0), inner = a.size(1);
  const Weight weight(b, b_scale, bias_);
  Tensor out = output(a, {rows, weight.outer}, dtype);
  if (out.numel() == 0) return out;
  const Device device(a);
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    launch_few_rows<int8_t, T>(
        device, {static_cast<const int8_t*>(a.const_data_ptr()), inner, data<float>(a_scale),
                 data<int8_t>(weight.weight), data<float>(weight.scale), weight.bias_of<T>(),
                 mutable_data<T>(out), rows, inner, weight.outer, Activation(activation),
                 a.scalar_type() == ScalarType::Byte ? kZeroPoint : 0});
  });
  return out;
}

Tensor int8_linear(const Tensor& input_, const Tensor& weight_, const Tensor& scale_,
                   const Optional&, const Optional& bias_, int64_t activation, double threshold) {
  const int64_t rows = input_.size(0), inner = input_.size(1);
  const Weight weight(weight_, scale_, bias_);
  Tensor out = output(input_, {rows, weight.outer}, input_.scalar_type());
  if (out.numel() == 0) return out;
  const RowView input(input_, inner);
  // The rows in int8 and their scales, and which columns hold outliers.
  const bool has_outliers = threshold > 0;
  const Tensor quantized = output(input_, {rows, inner}, ScalarType::Char);
  const Tensor row_scale = output(input_, {rows}, ScalarType::Float);
  const Tensor outliers = output(input_, {has_outliers ? inner : 0}, ScalarType::Byte);
  const Tensor list = output(input_, {has_outliers ? 1 + inner : 0}, ScalarType::Int);
  const Device device(input_);
  for_dtype(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = data<T>(*input.tensor);
    if (has_outliers)
      device.launch(outlier_kernel<T>, dim3(1), dim3(kMaxThreads),
                    OutlierArgs<T>{from, input.stride, rows, inner, float(threshold),
                                   mutable_data<uint8_t>(outliers), mutable_data<int32_t>(list)});
    quantize<T>(device,
                {from, input.stride, has_outliers ? data<uint8_t>(outliers) : nullptr,
                 mutable_data<int8_t>(quantized), mutable_data<float>(row_scale), rows, inner});
    launch_few_rows<int8_t, T>(
        device, {data<int8_t>(quantized), inner, data<float>(row_scale),
                 data<int8_t>(weight.weight), data<float>(weight.scale), weight.bias_of<T>(),
                 mutable_data<T>(out), rows, inner, weight.outer, Activation(activation), 0, from,
                 input.stride, has_outliers ? data<int32_t>(list) : nullptr});
  });
  return out;
}

bool has_few_rows(const StableIValue* stack) {
  int64_t rows = 0;
  const auto input = torch::stable::detail::to<AtenTensorHandle>(stack[0]);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(input, 0, &rows));
  return rows <= kMostRows;
}

Choice choose_int8_linear("int8_linear", kMostRows, -1);
Choice choose_int8_matmul("int8_matmul", kMostRows, -1);
Choice choose_int8_quantize("int8_quantize", kFewRows, -1);
Choice choose_int8_weight_only("int8_weight_only", kMostRows, -1, kNoLimit, has_few_rows);

}  // namespace

LLMOS_CUDA_OPS(m) {
  own<choose_int8_linear, &int8_linear>(m);
  own<choose_int8_matmul, &int8_matmul>(m);
  own<choose_int8_quantize, &int8_quantize>(m);
  own<choose_int8_weight_only, &int8_weight_only>(m);
}

}  // namespace llmos
