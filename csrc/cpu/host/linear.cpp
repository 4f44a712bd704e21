#include "../linear.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common.h"
#include "../layer_norm.h"
#include "gemm_tasks.h"

namespace llmos {
namespace {

// A matrix that a product can walk: one of its steps is 1.
struct Operand {
  Tensor tensor;
  int64_t row, column;

  explicit Operand(const Tensor& t)
      : tensor(has_lines(t) ? t : torch::stable::contiguous(t)), row(1), column(1) {
    if (in_one_piece(tensor, 1))
      row = tensor.size(0) == 1 ? tensor.size(1) : tensor.stride(0);
    else
      column = tensor.stride(1);
  }

  static bool in_one_piece(const Tensor& t, int64_t dim) {
    return t.stride(dim) == 1 || t.size(dim) == 1;
  }
  static bool has_lines(const Tensor& t) { return in_one_piece(t, 0) || in_one_piece(t, 1); }

  template <class T>
  Matrix<T> of() const {
    return {data<T>(tensor), row, column};
  }
};

Epilogue epilogue(int64_t activation, double dropout_p, const Optional& seed) {
  return {Activation(activation), dropout_of(dropout_p, seed)};
}

template <class T>
void few_rows(const LinearForward<T>& a, double work) {
  if (a.weight.column == 1) {
    const auto& kernel = *task_kernel<LinearFew<T>>.best();
    return run_tasks(kernel, LinearFew<T>{a}, ranges(a.outer, kernel.block), work);
  }
  // Only columns of the weight that some row multiplies with more than 0.
  const Floats x = floats(a.rows * a.inner);
  for (int64_t r = 0; r < a.rows; ++r)
    to_float<T>.best()(a.input.at(r, 0), x.get() + r * a.inner, a.inner);
  std::vector<int32_t> index;
  std::vector<float> values;
  for (int64_t k = 0; k < a.inner; ++k) {
    const auto at = [&](int64_t r) { return x[r * a.inner + k]; };
    bool any = false;
    for (int64_t r = 0; r < a.rows; ++r) any |= at(r) != 0;
    if (!any) continue;
    index.push_back(int32_t(k));
    for (int64_t r = 0; r < a.rows; ++r) values.push_back(at(r));
  }
  const LinearColumns<T> args{a, index.data(), values.data(), int64_t(index.size())};
  const auto& kernel = *task_kernel<LinearColumns<T>>.best();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t piece = std::clamp<int64_t>((a.outer + threads - 1) / threads, 256, kernel.block);
  run_tasks(kernel, args, ranges(a.outer, (piece + 15) / 16 * 16), work);
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& weight_,
                                   const Optional& bias_, int64_t activation, double dropout_p,
                                   const Optional& seed, bool keep) {
  const int64_t rows = input.size(0), inner = input.size(1), outer = weight_.size(0);
  Tensor out = output(input, {rows, outer}, input.scalar_type());
  Tensor kept = keep ? output_like(out) : output(input, {0}, input.scalar_type());
  if (out.numel() == 0) return {out, kept};
  const bool few = rows <= kFewRows && inner > 0;
  const Operand x(few ? llmos::contiguous(input) : input), weight(weight_);
  Optional bias;
  if (bias_) bias = llmos::contiguous(*bias_);
  dispatch(input.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const LinearForward<T> a{x.of<T>(),
                             weight.of<T>(),
                             bias ? data<T>(*bias) : nullptr,
                             mutable_data<T>(out),
                             keep ? mutable_data<T>(kept) : nullptr,
                             rows,
                             inner,
                             outer,
                             epilogue(activation, dropout_p, seed),
                             rows < kTurnedRows};
    const double work = double(rows) * inner * outer;
    if (few) return few_rows(a, work);
    const auto& kernel = *task_kernel<LinearForward<T>>.best();
    const int64_t most = columns_of(kernel, inner);
    const auto tasks = a.turned ? tasks_of(rows, kernel.block, outer, kBlockRows, most)
                                : tasks_of(outer, kernel.block, rows, kBlockRows, most);
    run_tasks(kernel, a, tasks, work);
  });
  return {out, kept};
}

std::tuple<Tensor, Tensor> dinput(const Tensor& dout_, const Tensor& weight_, const Optional& kept_,
                                  int64_t activation, double dropout_p, const Optional& seed) {
  const int64_t rows = dout_.size(0), outer = dout_.size(1), inner = weight_.size(1);
  const ScalarType dtype = dout_.scalar_type();
  Tensor result = output(dout_, {rows, inner}, dtype);
  Tensor dbias = output(dout_, {kept_ ? inner : 0}, dtype);
  const Operand dout(dout_), weight(weight_);
  Optional kept;
  if (kept_) kept = llmos::contiguous(*kept_);
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  const Floats sums = floats(kept ? chunks * inner : 0);
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const LinearDinput<T> a{dout.of<T>(),
                            weight.of<T>(),
                            kept ? data<T>(*kept) : nullptr,
                            mutable_data<T>(result),
                            kept ? sums.get() : nullptr,
                            rows,
                            inner,
                            outer,
                            epilogue(activation, dropout_p, seed)};
    const auto& kernel = *task_kernel<LinearDinput<T>>.best();
    run_tasks(kernel, a, tasks_of(inner, kernel.block, rows, kChunkRows, columns_of(kernel, outer)),
              double(rows) * inner * outer);
    if (kept) sum_partials<T>.best()(sums.get(), chunks, inner, mutable_data<T>(dbias), 0, inner);
  });
  return {result, dbias};
}

std::tuple<Tensor, Tensor> dweight(const Tensor& dout_, const Tensor& input_, bool bias) {
  const int64_t rows = dout_.size(0), outer = dout_.size(1), inner = input_.size(1);
  const ScalarType dtype = dout_.scalar_type();
  Tensor result = output(dout_, {outer, inner}, dtype);
  Tensor dbias = output(dout_, {bias ? outer : 0}, dtype);
  const Operand dout(dout_), input(input_);
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const LinearDweight<T> a{dout.of<T>(),
                             input.of<T>(),
                             mutable_data<T>(result),
                             bias ? mutable_data<T>(dbias) : nullptr,
                             rows,
                             inner,
                             outer};
    const auto& kernel = *task_kernel<LinearDweight<T>>.best();
    run_tasks(kernel, a,
              tasks_of(inner, kernel.block, outer, kBlockRows, columns_of(kernel, rows, 4)),
              double(rows) * inner * outer);
  });
  return {result, dbias};
}

Tensor elementwise(const Optional& dout_, const Tensor& kept_, int64_t activation, double dropout_p,
                   const Optional& seed) {
  Tensor result = output_like(kept_);
  const int64_t rows = kept_.size(0), columns = kept_.size(1);
  const Tensor kept = llmos::contiguous(kept_);
  Optional dout;
  if (dout_) dout = llmos::contiguous(*dout_);
  dispatch(kept.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Elementwise<T> a{dout ? data<T>(*dout) : nullptr, data<T>(kept), mutable_data<T>(result),
                           columns, epilogue(activation, dropout_p, seed)};
    const auto& kernel = *task_kernel<Elementwise<T>>.best();
    run_tasks(kernel, a, ranges(rows, kernel.block), 16.0 * rows * columns);
  });
  return result;
}

Tensor activation_forward(const Tensor& kept, int64_t activation, double dropout_p,
                          const Optional& seed) {
  return elementwise({}, kept, activation, dropout_p, seed);
}

Tensor activation_backward(const Tensor& dout, const Tensor& kept, int64_t activation,
                           double dropout_p, const Optional& seed) {
  return elementwise(dout, kept, activation, dropout_p, seed);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&forward));
  m.impl("linear_dinput", TORCH_BOX(&dinput));
  m.impl("linear_dweight", TORCH_BOX(&dweight));
  m.impl("activation_forward", TORCH_BOX(&activation_forward));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
}

}  // namespace llmos
