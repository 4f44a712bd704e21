// The embedding_layer_norm ops: the sum of up to three embedding tables, normalized, with dropout.
#include "../embedding.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../../tensor_view.h"
#include "norm_common.h"

namespace llmos {
namespace {

// Return the rows of a block, which stays in the L1 cache between its two passes.
int64_t rows_per_block(int64_t d) { return std::max<int64_t>(1, 4096 / d); }

// The indices and tables of an op. Raises IndexError for an index that its table does not have.
struct Sources {
  const Tensor* index[kMaxTables];
  std::optional<RowView> table[kMaxTables];
  int tables = 0;
  int64_t rows, d;

  Sources(std::initializer_list<const Tensor*> indices,
          std::initializer_list<const Tensor*> all_tables)
      : rows((*indices.begin())->numel()), d((*all_tables.begin())->size(1)) {
    for (int i = 0; i < kMaxTables; ++i) {
      const Tensor *ids = indices.begin()[i], *values = all_tables.begin()[i];
      if (!ids || !values) break;
      check(*ids, *values, **all_tables.begin());
      index[tables] = ids;
      table[tables++].emplace(*values, d);
    }
  }

  template <class T>
  EmbeddingSumArgs<T> of() const {
    EmbeddingSumArgs<T> sum{.table_count = tables, .d = d};
    for (int i = 0; i < tables; ++i)
      sum.tables[i] = {data<T>(*table[i]->tensor), table[i]->stride, data<int64_t>(*index[i]),
                       index[i]->numel()};
    return sum;
  }

 private:
  void check(const Tensor& ids, const Tensor& values, const Tensor& first) const {
    const int64_t count = ids.numel();
    STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous() &&
                        (count ? rows % count == 0 : rows == 0),
                    "embedding: expected contiguous int64 indices whose number divides ", rows,
                    ", got ", count);
    STD_TORCH_CHECK(
        values.dim() == 2 && values.size(1) == d && values.scalar_type() == first.scalar_type(),
        "embedding: expected tables [rows, ", d, "] of one dtype");
    const int64_t* id = data<int64_t>(ids);
    const int64_t limit = values.size(0);
    bool wrong = false;
    for (int64_t i = 0; i < count; ++i) wrong |= uint64_t(id[i]) >= uint64_t(limit);
    if (!wrong) return;
    id = std::find_if(id, id + count, [&](int64_t i) { return i < 0 || i >= limit; });
    throw std::out_of_range("index " + std::to_string(*id) + " is out of range for a table of " +
                            std::to_string(limit) + " rows");
  }
};

const Tensor* pointer(const Optional& t) { return t ? &*t : nullptr; }

std::tuple<Tensor, Tensor> forward(const Tensor& index0, const Optional& index1,
                                   const Optional& index2, const Tensor& table0,
                                   const Optional& table1, const Optional& table2,
                                   const Optional& weight_, const Optional& bias_, double eps,
                                   double dropout_p, const Optional& seed) {
  const Sources sources({&index0, pointer(index1), pointer(index2)},
                        {&table0, pointer(table1), pointer(table2)});
  const int64_t rows = sources.rows, d = sources.d;
  std::vector<int64_t> shape(index0.sizes().begin(), index0.sizes().end());
  shape.push_back(d);
  Tensor y = output(table0, shape, table0.scalar_type());
  Tensor stats = output(table0, {2, d ? rows : 0}, ScalarType::Float);
  if (rows * d == 0) return {y, stats};
  const NormParameter weight(weight_, d), bias(bias_, d);
  const Dropout dropout = dropout_of(dropout_p, seed);

  for_dtype(table0.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto args = sources.of<T>();
    const auto sum = sum_embeddings<T>.best();
    const auto normalize = norm_forward<T>.best();
    const auto drop = drop_rows<T>.best();
    T* out = mutable_data<T>(y);
    float* mean = mutable_data<float>(stats);
    const int64_t block = rows_per_block(d);
    const auto run = [&](int64_t begin, int64_t end) {
      const AlignedFloats h_(block * d), row_(d);
      T* h = reinterpret_cast<T*>(h_.data.get());
      for (int64_t row = begin; row < end; row += block) {
        const int64_t stop = std::min(end, row + block);
        sum(args, row, stop, h);
        const NormForwardArgs<T> norm{
            .x = h,
            .x_stride = d,
            .weight = weight.data,
            .bias = bias.data,
            .y = out + row * d,
            .mean = mean + row,
            .rstd = mean + rows + row,
            .d = d,
            .eps = float(eps),
        };
        normalize(norm, 0, stop - row, row_.data.get());
        if (dropout.threshold) drop(dropout, norm.y, d, row, stop, d, norm.y);
      }
    };
    if (rows * d <= kNormGrain) return run(0, rows);
    torch::stable::parallel_for(0, rows, 1 + kNormGrain / 2 / d, run);
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy_, const Tensor& index0,
                                            const Optional& index1, const Optional& index2,
                                            const Tensor& table0, const Optional& table1,
                                            const Optional& table2, const Optional& weight_,
                                            const Tensor& stats_, double dropout_p,
                                            const Optional& seed, bool weight_grad,
                                            bool bias_grad) {
  const Sources sources({&index0, pointer(index1), pointer(index2)},
                        {&table0, pointer(table1), pointer(table2)});
  const int64_t rows = sources.rows, d = sources.d;
  STD_TORCH_CHECK(dy_.numel() == rows * d && dy_.scalar_type() == table0.scalar_type(),
                  "embedding: the incoming gradient must have the shape and dtype of the output");
  const ScalarType dtype = weight_ ? weight_->scalar_type() : ScalarType::Float;
  Tensor dh = output_like(dy_);
  Tensor dweight = output(dy_, {weight_grad ? d : 0}, dtype);
  Tensor dbias = output(dy_, {bias_grad ? d : 0}, dtype);
  if (d == 0) return {dh, dweight, dbias};
  const RowView dy(dy_, d);
  const NormParameter weight(weight_, d);
  const Tensor stats = llmos::contiguous(stats_);
  const Dropout dropout = dropout_of(dropout_p, seed);

  for_dtype(table0.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto args = sources.of<T>();
    const auto sum = sum_embeddings<T>.best();
    const auto drop = drop_rows<T>.best();
    const auto gradients = norm_backward<T>.best();
    const T* g = data<T>(*dy.tensor);
    T* out = mutable_data<T>(dh);
    const float* mean = data<float>(stats);
    const int64_t block = rows_per_block(d);
    const auto run = [&](int64_t begin, int64_t end, float* weight_sum, float* bias_sum) {
      const AlignedFloats h_(block * d), dropped_(dropout.threshold ? block * d : 0);
      T *h = reinterpret_cast<T*>(h_.data.get()),
        *dropped = reinterpret_cast<T*>(dropped_.data.get());
      for (int64_t row = begin; row < end; row += block) {
        const int64_t stop = std::min(end, row + block);
        const T* block_dy = g + row * dy.stride;
        sum(args, row, stop, h);
        if (dropout.threshold) drop(dropout, block_dy, dy.stride, row, stop, d, dropped);
        const NormBackwardArgs<T> norm{
            .dy = dropout.threshold ? dropped : block_dy,
            .h = h,
            .dy_stride = dropout.threshold ? d : dy.stride,
            .h_stride = d,
            .weight = weight.data,
            .mean = mean + row,
            .rstd = mean + rows + row,
            .dresidual = out + row * d,
            .d = d,
        };
        gradients(norm, 0, stop - row, weight_sum, bias_sum);
      }
    };
    sum_weight_gradients(rows, d, dweight, dbias, run);
  });
  return {dh, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("embedding_layer_norm_forward", TORCH_BOX(&forward));
  m.impl("embedding_layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace llmos
