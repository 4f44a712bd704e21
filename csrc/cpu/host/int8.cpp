#include "../int8.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "gemm_tasks.h"

namespace llmos {
namespace {

// What quantising costs, in multiplications an element.
constexpr double kRowWork = 16;
constexpr float kSigned = 127, kUnsigned = 255;

int64_t units_of(int64_t elements) {
  const int64_t unit = multiplies_quads() ? 4 : 2;
  return (elements + unit - 1) / unit;
}

int64_t strips_of(int64_t columns) {
  const int64_t strip = task_kernel<Int8Pack>.best()->block;
  return (columns + strip - 1) / strip;
}

void pack_into(const Matrix<int8_t>& weight, void* packed, int64_t inner, int64_t outer) {
  run_tasks(*task_kernel<Int8Pack>.best(), Int8Pack{weight, packed, inner, outer},
            ranges(strips_of(outer), 1), double(inner) * outer);
}

Tensor pack(const Tensor& weight_) {
  STD_TORCH_CHECK(multiplies_quads(), "int8_pack: this CPU level packs no weights");
  const Tensor weight = llmos::contiguous(weight_);
  const int64_t outer = weight.size(0), inner = weight.size(1);
  const int64_t columns = task_kernel<Int8Pack>.best()->block;
  Tensor packed = output(weight, {strips_of(outer), units_of(inner), columns, 4}, ScalarType::Char);
  if (packed.numel())
    pack_into({data<int8_t>(weight), inner, 1}, mutable_data<int8_t>(packed), inner, outer);
  return packed;
}

template <class T>
void quantize(const Rows& input, Int8Rows<T> args, int64_t rows) {
  args.input = data<T>(*input.tensor);
  args.step = input.stride;
  const auto& kernel = *task_kernel<Int8Rows<T>>.best();
  run_tasks(kernel, args, ranges(rows, kernel.block), kRowWork * rows * args.columns);
}

std::tuple<Tensor, Tensor> int8_quantize(const Tensor& input_) {
  const int64_t rows = input_.size(0), columns = input_.size(1);
  Tensor quantized = output(input_, {rows, columns}, ScalarType::Char);
  Tensor scale = output(input_, {rows}, ScalarType::Float);
  const Rows input(input_, columns);
  dispatch(input_.scalar_type(), [&](auto t) {
    Int8Rows<decltype(t)> args{};
    args.rows = mutable_data<int8_t>(quantized);
    args.scale = mutable_data<float>(scale);
    args.columns = columns;
    args.levels = kSigned;
    quantize(input, args, rows);
  });
  return {quantized, scale};
}

// What every product takes of its weight's side.
struct Right {
  Tensor weight, scale;
  Optional packed, bias;

  Right(const Tensor& weight, const Tensor& scale, const Optional& packed, const Optional& bias)
      : weight(llmos::contiguous(weight)), scale(llmos::contiguous(scale)) {
    if (packed) this->packed = llmos::contiguous(*packed);
    if (bias) this->bias = llmos::contiguous(*bias);
  }
  Matrix<int8_t> matrix() const { return {data<int8_t>(weight), weight.size(1), 1}; }
};

// Whether the weight is read as it lies: packing it costs more than it brings to a few rows.
bool reads_few(int64_t rows, bool packed, bool outliers) {
  return rows <= kFewWithInt8 && !packed && !outliers;
}

// The weight's side of `args`; its packed weight, made into `own` if need be.
template <class T>
void take(const Right& right, int64_t activation, Int8Product<T>& args,
          std::optional<AlignedFloats>& own) {
  args.weight_scale = data<float>(right.scale);
  args.bias = right.bias ? data<T>(*right.bias) : nullptr;
  args.outer = right.weight.size(0);
  args.inner = right.weight.size(1);
  args.epilogue = {Activation(activation), {}};
  if (reads_few(args.rows, right.packed.has_value(), args.outliers.count)) return;
  if (right.packed) {
    args.packed = data<int8_t>(*right.packed);
    return;
  }
  const int64_t columns = task_kernel<Int8Pack>.best()->block;
  own.emplace(strips_of(args.outer) * units_of(args.inner) * columns);
  pack_into(right.matrix(), own->data.get(), args.inner, args.outer);
  args.packed = own->data.get();
}

// args has its rows, scales and offsets.
template <class T>
void multiply(Int8Product<T> args, const Right& right, const Tensor& out, int64_t activation) {
  std::optional<AlignedFloats> packed;
  args.rows = out.size(0);
  args.out = mutable_data<T>(out);
  take(right, activation, args, packed);
  const double work = double(args.rows) * args.inner * args.outer;
  if (reads_few(args.rows, right.packed.has_value(), args.outliers.count)) {
    const auto& kernel = *task_kernel<Int8Few<T>>.best();
    run_tasks(kernel, Int8Few<T>{args, right.matrix()}, ranges(args.outer, kernel.block), work);
    return;
  }
  const auto& kernel = *task_kernel<Int8Product<T>>.best();
  run_tasks(kernel, args, tasks_of(args.outer, kernel.block, args.rows, kBlockRows, kernel.panel),
            work);
}

Tensor int8_matmul(const Tensor& a_, const Tensor& b, const Tensor& a_scale_, const Tensor& b_scale,
                   const Optional& packed, const Optional& bias, int64_t activation,
                   ScalarType dtype) {
  const Tensor a = llmos::contiguous(a_), a_scale = llmos::contiguous(a_scale_);
  const int64_t rows = a.size(0), inner = a.size(1);
  Tensor out = output(a, {rows, b.size(0)}, dtype);
  if (out.numel() == 0) return out;
  const Right right(b, b_scale, packed, bias);
  const auto sums = [&](const Matrix<int8_t>& of, int64_t count) {
    std::vector<int32_t> found(count);
    const auto& kernel = *task_kernel<Int8Offsets>.best();
    run_tasks(kernel, Int8Offsets{of, found.data(), inner}, ranges(count, kernel.block),
              double(inner) * count);
    return found;
  };
  // Of uint8, elements less 128: what sums are too low is 128 times the sums of the weight's rows.
  std::vector<int8_t> lower;
  std::vector<int32_t> zeros;
  const bool is_unsigned = a.scalar_type() == ScalarType::Byte;
  if (is_unsigned) {
    const uint8_t* from = data<uint8_t>(a);
    lower.resize(rows * inner);
    std::transform(from, from + rows * inner, lower.begin(),
                   [](uint8_t v) { return int8_t(v ^ 0x80); });
    zeros = sums(right.matrix(), b.size(0));
  }
  const Matrix<int8_t> input{is_unsigned ? lower.data() : data<int8_t>(a), inner, 1};
  std::vector<int32_t> offsets;
  if (!reads_few(rows, packed.has_value(), false)) offsets = sums(input, rows);
  dispatch(dtype, [&](auto t) {
    Int8Product<decltype(t)> args{};
    args.input = input;
    args.input_scale = data<float>(a_scale);
    args.offsets = offsets.data();
    args.zeros = is_unsigned ? zeros.data() : nullptr;
    multiply(args, right, out, activation);
  });
  return out;
}

// Rows whose products are finished, and become int8, together.
constexpr int64_t kRowsTogether = 96;

std::tuple<Tensor, Tensor> int8_linear_rows(const Tensor& input_, const Tensor& weight,
                                            const Tensor& weight_scale, const Optional& packed,
                                            const Optional& bias, int64_t activation) {
  const int64_t rows = input_.size(0), inner = input_.size(1), outer = weight.size(0);
  const bool positive =
      activation == int64_t(Activation::Relu) || activation == int64_t(Activation::Relu2);
  Tensor out = output(input_, {rows, outer}, positive ? ScalarType::Byte : ScalarType::Char);
  Tensor scale = output(input_, {rows}, ScalarType::Float);
  if (rows == 0) return {out, scale};
  const Right right(weight, weight_scale, packed, bias);
  const Rows input(input_, inner);
  dispatch(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Floats input_scale = floats(rows);
    const auto quantized = std::make_unique_for_overwrite<int8_t[]>(rows * inner);
    const auto offsets = std::make_unique_for_overwrite<int32_t[]>(rows);
    Int8Rows<T> to{};
    to.rows = quantized.get();
    to.scale = input_scale.get();
    to.offsets = offsets.get();
    to.columns = inner;
    to.levels = kSigned;
    quantize(input, to, rows);
    // The packed weight, also for few rows: a task has rows of its own and all columns.
    Int8Product<T> all{};
    std::optional<AlignedFloats> own;
    all.rows = kFewWithInt8 + 1;
    take(right, activation, all, own);
    const auto& kernel = *task_kernel<Int8Product<T>>.best();
    const auto& row_kernel = *task_kernel<Int8Rows<T>>.best();
    // As many pieces for each thread, of at most kRowsTogether.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t least = (rows + kRowsTogether - 1) / kRowsTogether;
    const int64_t wanted = (least + threads - 1) / threads * threads;
    const int64_t together = (rows + wanted - 1) / wanted;
    const int64_t pieces = (rows + together - 1) / together;
    const auto run = [&](int64_t begin, int64_t end) {
      const auto y = std::make_unique_for_overwrite<T[]>(together * outer);
      Int8Product<T> args = all;
      args.out = y.get();
      const std::vector<ProductTask> panels = tasks_of(outer, kernel.block, 1, 1, kernel.panel);
      const AlignedFloats scratch(kernel.scratch(args));
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece * together;
        args.rows = std::min(together, rows - first);
        args.input = {quantized.get() + first * inner, inner, 1};
        args.input_scale = input_scale.get() + first;
        args.offsets = offsets.get() + first;
        std::vector<ProductTask> tasks = panels;
        for (ProductTask& task : tasks) task.end = args.rows;
        kernel.run(args, tasks.data(), int64_t(tasks.size()), scratch.data.get());
        Int8Rows<T> made{};
        made.input = y.get();
        made.step = made.columns = outer;
        made.rows = static_cast<int8_t*>(out.mutable_data_ptr()) + first * outer;
        made.scale = mutable_data<float>(scale) + first;
        made.levels = positive ? kUnsigned : kSigned;
        const ProductTask whole{0, 0, 0, args.rows};
        row_kernel.run(made, &whole, 1, nullptr);
      }
    };
    torch::stable::parallel_for(0, pieces, 1, run);
  });
  return {out, scale};
}

Tensor int8_linear(const Tensor& input_, const Tensor& weight, const Tensor& weight_scale,
                   const Optional& packed, const Optional& bias, int64_t activation,
                   double threshold) {
  const int64_t rows = input_.size(0), inner = input_.size(1);
  Tensor out = output(input_, {rows, weight.size(0)}, input_.scalar_type());
  if (out.numel() == 0) return out;
  const Right right(weight, weight_scale, packed, bias);
  const Rows input(input_, inner);
  dispatch(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Floats scale = floats(rows);
    const auto quantized = std::make_unique_for_overwrite<int8_t[]>(rows * inner);
    const auto offsets = std::make_unique_for_overwrite<int32_t[]>(rows);
    Int8Rows<T> to{};
    to.rows = quantized.get();
    to.scale = scale.get();
    to.columns = inner;
    to.levels = kSigned;
    if (threshold > 0 || !reads_few(rows, packed.has_value(), false)) to.offsets = offsets.get();
    std::vector<uint32_t> keep(threshold > 0 ? inner : 0, ~uint32_t(0));
    if (threshold > 0) to.keep = keep.data();
    to.threshold = float(threshold);
    quantize(input, to, rows);
    std::vector<int32_t> index;
    for (int64_t k = 0; k < int64_t(keep.size()); ++k)
      if (!keep[k]) index.push_back(int32_t(k));
    const Floats x = floats(rows * int64_t(index.size()));
    if (!index.empty()) {
      to.index = index.data();
      to.x = x.get();
      to.count = int64_t(index.size());
      quantize(input, to, rows);
    }
    Int8Product<T> args{};
    args.input = {quantized.get(), inner, 1};
    args.input_scale = scale.get();
    args.offsets = offsets.get();
    args.outliers = {index.data(), x.get(), to.count};
    multiply(args, right, out, activation);
  });
  return out;
}

Tensor int8_weight_only(const Tensor& input_, const Tensor& weight, const Tensor& weight_scale,
                        const Optional& bias, int64_t activation) {
  const int64_t rows = input_.size(0), inner = input_.size(1), outer = weight.size(0);
  STD_TORCH_CHECK(rows <= kFewWithInt8, "int8_weight_only: at most ", kFewWithInt8, " rows, got ",
                  rows);
  Tensor out = output(input_, {rows, outer}, input_.scalar_type());
  if (out.numel() == 0) return out;
  const Right right(weight, weight_scale, {}, bias);
  const Rows input(input_, inner);
  dispatch(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Int8Weight<T> args{{data<T>(*input.tensor), input.stride, 1},
                             right.matrix(),
                             data<float>(right.scale),
                             right.bias ? data<T>(*right.bias) : nullptr,
                             mutable_data<T>(out),
                             nullptr,
                             rows,
                             inner,
                             outer,
                             {Activation(activation), {}}};
    const auto& kernel = *task_kernel<Int8Weight<T>>.best();
    run_tasks(kernel, args, ranges(outer, kernel.block), double(rows) * inner * outer);
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
  m.impl("int8_pack", TORCH_BOX(&pack));
}

}  // namespace llmos
