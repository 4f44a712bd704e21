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

// The rows of dh that share an index, as lists in ascending order.
struct RowLists {
  std::vector<int64_t> first, next;  // -1: no row.

  RowLists(const Tensor& index, int64_t rows, int64_t table_rows)
      : first(table_rows, -1), next(rows) {
    const int64_t* id = data<int64_t>(index);
    const int64_t count = index.numel();
    for (int64_t row = rows - 1; row >= 0; --row) {
      const int64_t i = id[row % count];
      STD_TORCH_CHECK(uint64_t(i) < uint64_t(table_rows), "index ", i,
                      " is out of range for a table of ", table_rows, " rows");
      next[row] = first[i];
      first[i] = row;
    }
  }
};

Tensor table_gradient(const Tensor& dh_, const Tensor& index, int64_t table_rows, int64_t padding) {
  const int64_t d = dh_.size(dh_.dim() - 1), rows = d ? dh_.numel() / d : 0;
  Tensor out = output(dh_, {table_rows, d}, dh_.scalar_type());
  if (out.numel() == 0) return out;
  const RowView dh(dh_, d);
  RowLists lists(index, rows, table_rows);
  if (padding >= 0) lists.first[padding] = -1;
  for_dtype(dh_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto sum = sum_table_row<T>.best();
    T* to = mutable_data<T>(out);
    const auto part = [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                          float* sums) {
      const TableGradientArgs<T> args{
          data<T>(*dh.tensor), dh.stride, lists.next.data(), d, begin, end};
      for (int64_t row = row_begin; row < row_end; ++row) {
        if (lists.first[row] >= 0)
          sum(args, lists.first[row], sums, to + row * d);
        else
          std::fill_n(to + row * d + begin, end - begin, T{});
      }
    };
    if ((rows + table_rows) * d <= kNormGrain) return part(0, table_rows, 0, d, floats(d).get());
    // Threads take blocks of rows in turn: the most frequent words are neighbours. In a table of
    // few rows they take columns.
    constexpr int64_t kRows = 16, kColumns = 64;
    const int64_t threads = torch::stable::get_num_threads();
    const bool by_columns = table_rows < 4 * kRows * threads;
    const int64_t width = (d + threads * kColumns - 1) / (threads * kColumns) * kColumns;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      const Floats sums = floats(d);
      for (int64_t thread = first; thread < last; ++thread) {
        if (by_columns) {
          const int64_t begin = std::min(d, thread * width);
          part(0, table_rows, begin, std::min(d, begin + width), sums.get());
        } else {
          for (int64_t row = thread * kRows; row < table_rows; row += threads * kRows)
            part(row, std::min(table_rows, row + kRows), 0, d, sums.get());
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("embedding_layer_norm_forward", TORCH_BOX(&forward));
  m.impl("embedding_layer_norm_backward", TORCH_BOX(&backward));
  m.impl("embedding_table_gradient", TORCH_BOX(&table_gradient));
}

}  // namespace llmos
