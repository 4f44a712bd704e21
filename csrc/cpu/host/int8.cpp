// The int8 ops: quantization of rows, and linear layers with an int8 weight.
#include "../int8.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "gemm_tasks.h"

namespace llmos {
namespace {

// The cost of quantizing an element, in multiply-accumulates.
constexpr double kQuantizeWork = 16;
constexpr float kMaxInt8 = 127, kMaxUint8 = 255;

// The words of VNNI layout that hold so many elements.
int64_t words_of(int64_t elements) { return (elements + 3) / 4; }

int64_t micro_panels_of(int64_t columns) {
  const int64_t micro_panel = task_kernel<Int8VnniWeightArgs>.best()->block;
  return (columns + micro_panel - 1) / micro_panel;
}

void pack_weight(const Matrix<int8_t>& weight, void* vnni_weight, int64_t inner, int64_t outer) {
  run_in_parallel(*task_kernel<Int8VnniWeightArgs>.best(),
                  Int8VnniWeightArgs{weight, vnni_weight, inner, outer},
                  range_tasks(micro_panels_of(outer), 1), double(inner) * outer);
}

Tensor vnni_weight_of(const Tensor& weight_) {
  const Tensor weight = llmos::contiguous(weight_);
  const int64_t outer = weight.size(0), inner = weight.size(1);
  const int64_t columns = task_kernel<Int8VnniWeightArgs>.best()->block;
  Tensor vnni_weight =
      output(weight, {micro_panels_of(outer), words_of(inner), columns, 4}, ScalarType::Char);
  if (vnni_weight.numel())
    pack_weight({data<int8_t>(weight), inner, 1}, mutable_data<int8_t>(vnni_weight), inner, outer);
  return vnni_weight;
}

template <class T>
void quantize(const RowView& input, Int8QuantizeArgs<T> args, int64_t rows) {
  args.input = data<T>(*input.tensor);
  args.row_stride = input.stride;
  const auto& kernel = *task_kernel<Int8QuantizeArgs<T>>.best();
  run_in_parallel(kernel, args, range_tasks(rows, kernel.block),
                  kQuantizeWork * rows * args.columns);
}

std::tuple<Tensor, Tensor> int8_quantize(const Tensor& input_) {
  const int64_t rows = input_.size(0), columns = input_.size(1);
  Tensor quantized = output(input_, {rows, columns}, ScalarType::Char);
  Tensor scale = output(input_, {rows}, ScalarType::Float);
  const RowView input(input_, columns);
  for_dtype(input_.scalar_type(), [&](auto t) {
    Int8QuantizeArgs<decltype(t)> args{};
    args.quantized = mutable_data<int8_t>(quantized);
    args.scale = mutable_data<float>(scale);
    args.columns = columns;
    args.max_level = kMaxInt8;
    quantize(input, args, rows);
  });
  return {quantized, scale};
}

// The weight side of an int8 linear layer.
struct WeightOperand {
  Tensor weight, scale;
  Optional vnni_weight, bias;

  WeightOperand(const Tensor& weight, const Tensor& scale, const Optional& vnni_weight,
                const Optional& bias)
      : weight(llmos::contiguous(weight)), scale(llmos::contiguous(scale)) {
    if (vnni_weight) this->vnni_weight = llmos::contiguous(*vnni_weight);
    if (bias) this->bias = llmos::contiguous(*bias);
  }
  Matrix<int8_t> matrix() const { return {data<int8_t>(weight), weight.size(1), 1}; }
};

// Return true if a GEMV reads the weight in its plain layout: for few rows, packing it would cost
// more than it saves.
bool uses_gemv(int64_t rows, bool has_vnni_weight, bool outliers) {
  return rows <= kInt8GemvMaxRows && !has_vnni_weight && !outliers;
}

// Set the weight side of `args`. A weight that comes without its VNNI layout is packed into
// packed_here.
template <class T>
void take_weight(const WeightOperand& weight_operand, int64_t activation, Int8GemmArgs<T>& args,
                 std::optional<AlignedFloats>& packed_here) {
  args.weight_scale = data<float>(weight_operand.scale);
  args.bias = weight_operand.bias ? data<T>(*weight_operand.bias) : nullptr;
  args.outer = weight_operand.weight.size(0);
  args.inner = weight_operand.weight.size(1);
  args.epilogue = {Activation(activation), {}};
  if (uses_gemv(args.rows, weight_operand.vnni_weight.has_value(), args.outliers.count)) return;
  if (weight_operand.vnni_weight) {
    args.vnni_weight = data<int8_t>(*weight_operand.vnni_weight);
    return;
  }
  const int64_t columns = task_kernel<Int8VnniWeightArgs>.best()->block;
  packed_here.emplace(micro_panels_of(args.outer) * words_of(args.inner) * columns);
  pack_weight(weight_operand.matrix(), packed_here->data.get(), args.inner, args.outer);
  args.vnni_weight = packed_here->data.get();
}

// Run the GEMM or GEMV. `args` has its rows, scales and corrections.
template <class T>
void multiply(Int8GemmArgs<T> args, const WeightOperand& weight_operand, const Tensor& out,
              int64_t activation) {
  std::optional<AlignedFloats> packed_here;
  args.rows = out.size(0);
  args.out = mutable_data<T>(out);
  take_weight(weight_operand, activation, args, packed_here);
  const double work = double(args.rows) * args.inner * args.outer;
  if (uses_gemv(args.rows, weight_operand.vnni_weight.has_value(), args.outliers.count)) {
    const auto& kernel = *task_kernel<Int8GemvArgs<T>>.best();
    run_in_parallel(kernel, Int8GemvArgs<T>{args, weight_operand.matrix()},
                    range_tasks(args.outer, kernel.block), work);
    return;
  }
  const auto& kernel = *task_kernel<Int8GemmArgs<T>>.best();
  run_in_parallel(kernel, args,
                  gemm_tasks(args.outer, kernel.block, args.rows, kBlockRows, kernel.panel), work);
}

Tensor int8_matmul(const Tensor& a_, const Tensor& b, const Tensor& a_scale_, const Tensor& b_scale,
                   const Optional& vnni_weight, const Optional& bias, int64_t activation,
                   ScalarType dtype) {
  const Tensor a = llmos::contiguous(a_), a_scale = llmos::contiguous(a_scale_);
  const int64_t rows = a.size(0), inner = a.size(1);
  Tensor out = output(a, {rows, b.size(0)}, dtype);
  if (out.numel() == 0) return out;
  const WeightOperand weight_operand(b, b_scale, vnni_weight, bias);
  const auto corrections_of = [&](const Matrix<int8_t>& of, int64_t count) {
    std::vector<int32_t> corrections(count);
    const auto& kernel = *task_kernel<Int8ZeroPointArgs>.best();
    run_in_parallel(kernel, Int8ZeroPointArgs{of, corrections.data(), inner},
                    range_tasks(count, kernel.block), double(inner) * count);
    return corrections;
  };
  // A uint8 input is multiplied as int8 = uint8 - 128. Zero-point correction: 128 times the
  // sums of the weight's rows.
  std::vector<int8_t> shifted;
  std::vector<int32_t> column_corrections;
  const bool is_unsigned = a.scalar_type() == ScalarType::Byte;
  if (is_unsigned) {
    const uint8_t* from = data<uint8_t>(a);
    shifted.resize(rows * inner);
    std::transform(from, from + rows * inner, shifted.begin(),
                   [](uint8_t v) { return int8_t(v ^ 0x80); });
    column_corrections = corrections_of(weight_operand.matrix(), b.size(0));
  }
  const Matrix<int8_t> input{is_unsigned ? shifted.data() : data<int8_t>(a), inner, 1};
  std::vector<int32_t> row_corrections;
  if (has_vnni() && !uses_gemv(rows, vnni_weight.has_value(), false))
    row_corrections = corrections_of(input, rows);
  for_dtype(dtype, [&](auto t) {
    Int8GemmArgs<decltype(t)> args{};
    args.input = input;
    args.input_scale = data<float>(a_scale);
    args.row_corrections = row_corrections.data();
    args.column_corrections = is_unsigned ? column_corrections.data() : nullptr;
    multiply(args, weight_operand, out, activation);
  });
  return out;
}

// Rows that pass through the GEMM and are quantized again while they are in the cache.
constexpr int64_t kRowsPerStep = 96;

std::tuple<Tensor, Tensor> int8_linear_rows(const Tensor& input_, const Tensor& weight,
                                            const Tensor& weight_scale, const Optional& vnni_weight,
                                            const Optional& bias, int64_t activation) {
  const int64_t rows = input_.size(0), inner = input_.size(1), outer = weight.size(0);
  const bool is_unsigned =
      activation == int64_t(Activation::Relu) || activation == int64_t(Activation::Relu2);
  Tensor out = output(input_, {rows, outer}, is_unsigned ? ScalarType::Byte : ScalarType::Char);
  Tensor scale = output(input_, {rows}, ScalarType::Float);
  if (rows == 0) return {out, scale};
  const WeightOperand weight_operand(weight, weight_scale, vnni_weight, bias);
  const RowView input(input_, inner);
  for_dtype(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Floats input_scale = floats(rows);
    const auto quantized = std::make_unique_for_overwrite<int8_t[]>(rows * inner);
    const auto row_corrections = std::make_unique_for_overwrite<int32_t[]>(rows);
    Int8QuantizeArgs<T> quantize_args{};
    quantize_args.quantized = quantized.get();
    quantize_args.scale = input_scale.get();
    quantize_args.row_corrections = row_corrections.get();
    quantize_args.columns = inner;
    quantize_args.max_level = kMaxInt8;
    quantize(input, quantize_args, rows);
    // The GEMM and the VNNI layout are used even for few rows: a task takes some rows and all
    // columns.
    Int8GemmArgs<T> shared_args{};
    std::optional<AlignedFloats> packed_here;
    shared_args.rows = kInt8GemvMaxRows + 1;
    take_weight(weight_operand, activation, shared_args, packed_here);
    const auto& kernel = *task_kernel<Int8GemmArgs<T>>.best();
    const auto& quantize_kernel = *task_kernel<Int8QuantizeArgs<T>>.best();
    // Every thread gets the same number of pieces, each of at most kRowsPerStep rows.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t min_pieces = (rows + kRowsPerStep - 1) / kRowsPerStep;
    const int64_t wanted_pieces = (min_pieces + threads - 1) / threads * threads;
    const int64_t rows_per_piece = (rows + wanted_pieces - 1) / wanted_pieces;
    const int64_t pieces = (rows + rows_per_piece - 1) / rows_per_piece;
    const auto run = [&](int64_t begin, int64_t end) {
      const auto y = std::make_unique_for_overwrite<T[]>(rows_per_piece * outer);
      Int8GemmArgs<T> args = shared_args;
      args.out = y.get();
      const std::vector<GemmTask> panel_tasks = gemm_tasks(outer, kernel.block, 1, 1, kernel.panel);
      const AlignedFloats scratch(kernel.scratch(args));
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first_row = piece * rows_per_piece;
        args.rows = std::min(rows_per_piece, rows - first_row);
        args.input = {quantized.get() + first_row * inner, inner, 1};
        args.input_scale = input_scale.get() + first_row;
        args.row_corrections = row_corrections.get() + first_row;
        std::vector<GemmTask> tasks = panel_tasks;
        for (GemmTask& task : tasks) task.end = args.rows;
        kernel.run(args, tasks.data(), int64_t(tasks.size()), scratch.data.get());
        Int8QuantizeArgs<T> requantize_args{};
        requantize_args.input = y.get();
        requantize_args.row_stride = requantize_args.columns = outer;
        requantize_args.quantized =
            static_cast<int8_t*>(out.mutable_data_ptr()) + first_row * outer;
        requantize_args.scale = mutable_data<float>(scale) + first_row;
        requantize_args.max_level = is_unsigned ? kMaxUint8 : kMaxInt8;
        const GemmTask all_rows{0, 0, 0, args.rows};
        quantize_kernel.run(requantize_args, &all_rows, 1, nullptr);
      }
    };
    torch::stable::parallel_for(0, pieces, 1, run);
  });
  return {out, scale};
}

Tensor int8_linear(const Tensor& input_, const Tensor& weight, const Tensor& weight_scale,
                   const Optional& vnni_weight, const Optional& bias, int64_t activation,
                   double threshold) {
  const int64_t rows = input_.size(0), inner = input_.size(1);
  Tensor out = output(input_, {rows, weight.size(0)}, input_.scalar_type());
  if (out.numel() == 0) return out;
  const WeightOperand weight_operand(weight, weight_scale, vnni_weight, bias);
  const RowView input(input_, inner);
  for_dtype(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Floats scale = floats(rows);
    const auto quantized = std::make_unique_for_overwrite<int8_t[]>(rows * inner);
    const auto row_corrections = std::make_unique_for_overwrite<int32_t[]>(rows);
    Int8QuantizeArgs<T> quantize_args{};
    quantize_args.quantized = quantized.get();
    quantize_args.scale = scale.get();
    quantize_args.columns = inner;
    quantize_args.max_level = kMaxInt8;
    if (threshold > 0 || !uses_gemv(rows, vnni_weight.has_value(), false))
      quantize_args.row_corrections = row_corrections.get();
    std::vector<uint32_t> column_mask(threshold > 0 ? inner : 0, ~uint32_t(0));
    if (threshold > 0) quantize_args.column_mask = column_mask.data();
    quantize_args.threshold = float(threshold);
    quantize(input, quantize_args, rows);
    std::vector<int32_t> outlier_index;
    for (int64_t k = 0; k < int64_t(column_mask.size()); ++k)
      if (!column_mask[k]) outlier_index.push_back(int32_t(k));
    const Floats outlier_values = floats(rows * int64_t(outlier_index.size()));
    if (!outlier_index.empty()) {
      quantize_args.outlier_index = outlier_index.data();
      quantize_args.outlier_values = outlier_values.get();
      quantize_args.outlier_count = int64_t(outlier_index.size());
      quantize(input, quantize_args, rows);
    }
    Int8GemmArgs<T> args{};
    args.input = {quantized.get(), inner, 1};
    args.input_scale = scale.get();
    args.row_corrections = row_corrections.get();
    args.outliers = {outlier_index.data(), outlier_values.get(), quantize_args.outlier_count};
    multiply(args, weight_operand, out, activation);
  });
  return out;
}

Tensor int8_weight_only(const Tensor& input_, const Tensor& weight, const Tensor& weight_scale,
                        const Optional& bias, int64_t activation) {
  const int64_t rows = input_.size(0), inner = input_.size(1), outer = weight.size(0);
  STD_TORCH_CHECK(rows <= kInt8GemvMaxRows, "int8_weight_only: at most ", kInt8GemvMaxRows,
                  " rows, got ", rows);
  Tensor out = output(input_, {rows, outer}, input_.scalar_type());
  if (out.numel() == 0) return out;
  const WeightOperand weight_operand(weight, weight_scale, {}, bias);
  const RowView input(input_, inner);
  for_dtype(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Int8WeightOnlyArgs<T> args{{data<T>(*input.tensor), input.stride, 1},
                                     weight_operand.matrix(),
                                     data<float>(weight_operand.scale),
                                     weight_operand.bias ? data<T>(*weight_operand.bias) : nullptr,
                                     mutable_data<T>(out),
                                     nullptr,
                                     rows,
                                     inner,
                                     outer,
                                     {Activation(activation), {}}};
    const auto& kernel = *task_kernel<Int8WeightOnlyArgs<T>>.best();
    run_in_parallel(kernel, args, range_tasks(outer, kernel.block), double(rows) * inner * outer);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("int8_quantize", TORCH_BOX(&int8_quantize));
  m.impl("int8_matmul", TORCH_BOX(&int8_matmul));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_linear_rows", TORCH_BOX(&int8_linear_rows));
  m.impl("int8_weight_only", TORCH_BOX(&int8_weight_only));
  m.impl("int8_vnni_weight", TORCH_BOX(&vnni_weight_of));
}

}  // namespace llmos
