#include "int8.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "product_host.h"

namespace llmos {
namespace {

std::tuple<Tensor, Tensor> quantize(const Tensor& input_) {
  const int64_t rows = input_.size(0), columns = input_.size(1);
  Tensor quantized = output(input_, {rows, columns}, ScalarType::Char);
  Tensor scale = output(input_, {rows}, ScalarType::Float);
  const Rows input(input_, columns);
  dispatch(input_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Int8Rows<T> a{data<T>(*input.tensor), input.stride, mutable_data<int8_t>(quantized),
                        mutable_data<float>(scale), columns};
    const auto& kernel = *task_kernel<Int8Rows<T>>.best();
    run_tasks(kernel, a, ranges(rows, kernel.block), 4.0 * rows * columns);
  });
  return {quantized, scale};
}

Tensor matmul(const Tensor& a_, const Tensor& b_, const Tensor& a_scale_, const Tensor& b_scale_,
              const Optional& bias_, int64_t activation, ScalarType dtype) {
  const Tensor a = llmos::contiguous(a_), b = llmos::contiguous(b_);
  const Tensor a_scale = llmos::contiguous(a_scale_), b_scale = llmos::contiguous(b_scale_);
  const int64_t rows = a.size(0), inner = a.size(1), outer = b.size(0);
  Tensor out = output(a, {rows, outer}, dtype);
  if (out.numel() == 0) return out;
  Optional bias;
  if (bias_) bias = llmos::contiguous(*bias_);
  const Matrix<int8_t> input{data<int8_t>(a), inner, 1}, weight{data<int8_t>(b), inner, 1};
  const double work = double(rows) * inner * outer;
  const bool few = rows <= kFewRows && inner > 0, turned = rows < kTurnedRows;
  const int64_t left_rows = turned ? outer : rows;
  std::vector<int32_t> offsets(few ? 0 : left_rows);
  if (!few) {
    const Int8Offsets args{turned ? weight : input, offsets.data(), inner};
    const auto& kernel = *task_kernel<Int8Offsets>.best();
    run_tasks(kernel, args, ranges(left_rows, kernel.block), double(inner) * left_rows);
  }
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const Int8Product<T> args{input,
                              weight,
                              data<float>(a_scale),
                              data<float>(b_scale),
                              few ? nullptr : offsets.data(),
                              bias ? data<T>(*bias) : nullptr,
                              mutable_data<T>(out),
                              nullptr,
                              rows,
                              inner,
                              outer,
                              {Activation(activation), {}},
                              turned};
    if (few) {
      const auto& kernel = *task_kernel<Int8Few<T>>.best();
      return run_tasks(kernel, Int8Few<T>{args}, ranges(outer, kernel.block), work);
    }
    const auto& kernel = *task_kernel<Int8Product<T>>.best();
    const auto tasks = turned ? tasks_of(rows, kernel.block, outer, kBlockRows)
                              : tasks_of(outer, kernel.block, rows, kBlockRows);
    run_tasks(kernel, args, tasks, work);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("int8_quantize", TORCH_BOX(&quantize));
  m.impl("int8_matmul", TORCH_BOX(&matmul));
}

}  // namespace llmos
