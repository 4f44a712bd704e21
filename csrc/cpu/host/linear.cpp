// The ops of linear layers: forward, gradients, and the activation alone.
#include "../linear.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../layer_norm.h"
#include "gemm_tasks.h"
#include "linear_inputs.h"

namespace llmos {
namespace {

template <class T>
void gemv(const LinearForwardArgs<T>& a, double work) {
  if (a.weight.column_stride == 1) {
    const auto& kernel = *task_kernel<LinearGemvArgs<T>>.best();
    return run_in_parallel(kernel, LinearGemvArgs<T>{a}, range_tasks(a.outer, kernel.block), work);
  }
  // Find the input columns that are not zero in every row (after relu many are): the others need no
  // column of the weight.
  const Floats x = floats(a.rows * a.inner);
  for (int64_t r = 0; r < a.rows; ++r)
    to_float<T>.best()(a.input.at(r, 0), x.get() + r * a.inner, a.inner);
  std::vector<int32_t> index;
  std::vector<float> values;
  for (int64_t k = 0; k < a.inner; ++k) {
    const auto at = [&](int64_t r) { return x[r * a.inner + k]; };
    bool any_nonzero = false;
    for (int64_t r = 0; r < a.rows; ++r) any_nonzero |= at(r) != 0;
    if (!any_nonzero) continue;
    index.push_back(int32_t(k));
    for (int64_t r = 0; r < a.rows; ++r) values.push_back(at(r));
  }
  const LinearSparseGemvArgs<T> args{a, index.data(), values.data(), int64_t(index.size())};
  const auto& kernel = *task_kernel<LinearSparseGemvArgs<T>>.best();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t columns_per_task =
      std::clamp<int64_t>((a.outer + threads - 1) / threads, 256, kernel.block);
  run_in_parallel(kernel, args, range_tasks(a.outer, (columns_per_task + 15) / 16 * 16), work);
}

}  // namespace

template <class T>
void run_linear(const LinearForwardArgs<T>& a) {
  const double work = double(a.rows) * a.inner * a.outer;
  if (uses_gemv(a.rows, a.inner)) return gemv(a, work);
  STD_TORCH_CHECK(!a.panels || !a.transposed, "panels are those of a weight on the right");
  const auto& kernel = *task_kernel<LinearForwardArgs<T>>.best();
  const int64_t max_columns = max_panel_columns(kernel, a.inner);
  if (a.panels && a.rows <= kBlockRows) {  // One panel after the other, in the order of memory.
    std::vector<GemmTask> tasks;
    for (int64_t first = 0; first < a.outer; first += kernel.block)
      tasks.push_back({first, std::min(kernel.block, a.outer - first), 0, a.rows});
    return run_in_parallel(kernel, a, tasks, work);
  }
  // Few rows of a narrow weight still are work for all threads.
  const auto tasks = a.transposed
                         ? gemm_tasks(a.rows, kernel.block, a.outer, kBlockRows / 4, max_columns)
                         : gemm_tasks(a.outer, kernel.block, a.rows, kBlockRows, max_columns);
  run_in_parallel(kernel, a, tasks, work);
}
template void run_linear(const LinearForwardArgs<float>&);
template void run_linear(const LinearForwardArgs<bf16>&);
template void run_linear(const LinearForwardArgs<f16>&);

namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& weight_,
                                   const Optional& bias_, int64_t activation, double dropout_p,
                                   const Optional& seed, bool save_pre_activation) {
  const int64_t rows = input.size(0), inner = input.size(1), outer = weight_.size(0);
  Tensor out = output(input, {rows, outer}, input.scalar_type());
  Tensor pre_activation =
      save_pre_activation ? output_like(out) : output(input, {0}, input.scalar_type());
  if (out.numel() == 0) return {out, pre_activation};
  const Operand x(uses_gemv(rows, inner) ? llmos::contiguous(input) : input), weight(weight_);
  Optional bias;
  if (bias_) bias = llmos::contiguous(*bias_);
  for_dtype(input.scalar_type(), [&](auto t) {
    using T = decltype(t);
    run_linear<T>({x.of<T>(), weight.of<T>(), bias ? data<T>(*bias) : nullptr, mutable_data<T>(out),
                   save_pre_activation ? mutable_data<T>(pre_activation) : nullptr, rows, inner,
                   outer, epilogue(activation, dropout_p, seed), rows < kTransposedBelowRows});
  });
  return {out, pre_activation};
}

Tensor linear_panels(const Tensor& weight_) {
  const int64_t outer = weight_.size(0), inner = weight_.size(1);
  const Operand weight(weight_);
  Tensor result;
  for_dtype(weight_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    result = output(weight_, {panel_bytes<T>.best()(inner, outer)}, ScalarType::Byte);
    const auto& kernel = *task_kernel<LinearPanelsArgs<T>>.best();
    const LinearPanelsArgs<T> a{weight.of<T>(), mutable_data<uint8_t>(result), inner, outer};
    run_in_parallel(kernel, a, range_tasks(outer, kernel.block), double(inner) * outer);
  });
  return result;
}

std::tuple<Tensor, Tensor> dinput(const Tensor& dout_, const Tensor& weight_,
                                  const Optional& saved_, int64_t activation, double dropout_p,
                                  const Optional& seed) {
  const int64_t rows = dout_.size(0), outer = dout_.size(1), inner = weight_.size(1);
  const ScalarType dtype = dout_.scalar_type();
  Tensor result = output(dout_, {rows, inner}, dtype);
  Tensor dbias = output(dout_, {saved_ ? inner : 0}, dtype);
  const Operand dout(dout_), weight(weight_);
  Optional saved;
  if (saved_) saved = llmos::contiguous(*saved_);
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  const Floats sums = floats(saved ? chunks * inner : 0);
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const LinearDinputArgs<T> a{dout.of<T>(),
                                weight.of<T>(),
                                saved ? data<T>(*saved) : nullptr,
                                mutable_data<T>(result),
                                saved ? sums.get() : nullptr,
                                rows,
                                inner,
                                outer,
                                epilogue(activation, dropout_p, seed)};
    const auto& kernel = *task_kernel<LinearDinputArgs<T>>.best();
    run_in_parallel(kernel, a,
                    gemm_tasks(inner, kernel.block, rows, saved ? kChunkRows : kBlockRows,
                               max_panel_columns(kernel, outer)),
                    double(rows) * inner * outer);
    if (saved) sum_partials<T>.best()(sums.get(), chunks, inner, mutable_data<T>(dbias), 0, inner);
  });
  return {result, dbias};
}

std::tuple<Tensor, Tensor> dweight(const Tensor& dout_, const Tensor& input_, bool bias) {
  const int64_t rows = dout_.size(0), outer = dout_.size(1), inner = input_.size(1);
  const ScalarType dtype = dout_.scalar_type();
  Tensor result = output(dout_, {outer, inner}, dtype);
  Tensor dbias = output(dout_, {bias ? outer : 0}, dtype);
  const Operand dout(dout_), input(input_);
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const LinearDweightArgs<T> a{dout.of<T>(),
                                 input.of<T>(),
                                 mutable_data<T>(result),
                                 bias ? mutable_data<T>(dbias) : nullptr,
                                 rows,
                                 inner,
                                 outer};
    const auto& kernel = *task_kernel<LinearDweightArgs<T>>.best();
    run_in_parallel(
        kernel, a,
        gemm_tasks(inner, kernel.block, outer, kBlockRows, max_panel_columns(kernel, rows, 4)),
        double(rows) * inner * outer);
  });
  return {result, dbias};
}

Tensor activation_pass(const Optional& dout_, const Tensor& saved_, int64_t activation,
                       double dropout_p, const Optional& seed) {
  Tensor result = output_like(saved_);
  const int64_t rows = saved_.size(0), columns = saved_.size(1);
  const Tensor saved = llmos::contiguous(saved_);
  Optional dout;
  if (dout_) dout = llmos::contiguous(*dout_);
  for_dtype(saved.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const ActivationArgs<T> a{dout ? data<T>(*dout) : nullptr, data<T>(saved),
                              mutable_data<T>(result), columns,
                              epilogue(activation, dropout_p, seed)};
    const auto& kernel = *task_kernel<ActivationArgs<T>>.best();
    run_in_parallel(kernel, a, range_tasks(rows, kernel.block), 16.0 * rows * columns);
  });
  return result;
}

Tensor activation_forward(const Tensor& saved, int64_t activation, double dropout_p,
                          const Optional& seed) {
  return activation_pass({}, saved, activation, dropout_p, seed);
}

Tensor activation_backward(const Tensor& dout, const Tensor& saved, int64_t activation,
                           double dropout_p, const Optional& seed) {
  return activation_pass(dout, saved, activation, dropout_p, seed);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&forward));
  m.impl("linear_panels", TORCH_BOX(&linear_panels));
  m.impl("linear_dinput", TORCH_BOX(&dinput));
  m.impl("linear_dweight", TORCH_BOX(&dweight));
  m.impl("activation_forward", TORCH_BOX(&activation_forward));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
}

}  // namespace llmos
