// The sum of up to three embedding tables, normalized, with dropout; llmos_kernels/ops/embedding.py
// has the formulas. An index outside of its table reads nothing and gives a row of NaN.
#include <tuple>
#include <vector>

#include "norm.h"

namespace llmos {
namespace {

constexpr int kMaxTables = 3;

// Row r of the sum takes row index[r % count] of the table.
template <class T>
struct Table {
  const T* data;
  int64_t stride, rows;
  const int64_t* index;
  int64_t count;
};

template <class T, class W>
struct EmbeddingArgs {
  Table<T> tables[kMaxTables];
  int table_count;
  const W* weight;  // Null: ones.
  const W* bias;    // Null: zeros.
  T* y;
  float* mean;
  float* rstd;
  int64_t rows, d;
  float eps;
  Dropout dropout;
};

template <class T, class W, int kPack>
__global__ void __launch_bounds__(kMaxThreads) embedding_kernel(EmbeddingArgs<T, W> a) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= a.rows) return;     // A whole warp: nobody waits for it.
  const T* from[kMaxTables] = {};  // Null: the index is out of range.
#pragma unroll
  for (int i = 0; i < kMaxTables; ++i) {
    if (i >= a.table_count) break;
    const Table<T>& table = a.tables[i];
    const int64_t at = load_global<int64_t>(table.index + index % table.count);
    if (at >= 0 && at < table.rows) from[i] = table.data + at * table.stride;
  }
  const auto look_up = [&](const T* row, int64_t at, float (&v)[kPack]) {
    if (row) return load(row + at, v);
#pragma unroll
    for (int i = 0; i < kPack; ++i) v[i] = __uint_as_float(0x7fc00000);  // NaN.
  };
  // Read the sum of all rows, rounded after each addition.
  const auto read = [&](int64_t at, float (&v)[kPack]) {
    look_up(from[0], at, v);
#pragma unroll
    for (int t = 1; t < kMaxTables; ++t) {
      if (t >= a.table_count) break;
      float addend[kPack];
      look_up(from[t], at, addend);
#pragma unroll
      for (int i = 0; i < kPack; ++i) v[i] = float(T(v[i] + addend[i]));
    }
  };
  Row<kPack> row(a.d);
  const Moments moments = moments_of(row, read, read, true, a.eps);
  if (threadIdx.x == 0) {
    store_global(a.mean + index, moments.mean);
    store_global(a.rstd + index, moments.rstd);
  }
  const Mask mask(a.dropout);
  row.each(read, [&](int64_t at, const float (&v)[kPack]) {
    T y[kPack];
    scale_and_shift(v, moments, a.weight, a.bias, at, y);
    if (a.dropout.seed) {
      float dropped[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) dropped[i] = float(y[i]);
      mask.apply(index, at, dropped);
#pragma unroll
      for (int i = 0; i < kPack; ++i) y[i] = T(dropped[i]);
    }
    store_raw(a.y + index * a.d + at, y);
  });
}

// The indices and tables of a call, checked.
struct Sources {
  std::vector<const Tensor*> index;
  std::optional<RowView> table[kMaxTables];
  std::vector<int64_t> table_rows;
  int64_t rows, d;

  Sources(std::initializer_list<const Tensor*> indices,
          std::initializer_list<const Tensor*> all_tables)
      : rows((*indices.begin())->numel()), d((*all_tables.begin())->size(1)) {
    for (int i = 0; i < kMaxTables; ++i) {
      const Tensor *ids = indices.begin()[i], *values = all_tables.begin()[i];
      if (!ids || !values) break;
      const int64_t count = ids->numel();
      STD_TORCH_CHECK(ids->scalar_type() == ScalarType::Long && ids->is_contiguous() &&
                          (count ? rows % count == 0 : rows == 0),
                      "embedding: expected contiguous int64 indices whose number divides ", rows,
                      ", got ", count);
      STD_TORCH_CHECK(values->dim() == 2 && values->size(1) == d &&
                          values->scalar_type() == (*all_tables.begin())->scalar_type(),
                      "embedding: expected tables [rows, ", d, "] of one dtype");
      table[index.size()].emplace(*values, d);
      table_rows.push_back(values->size(0));
      index.push_back(ids);
    }
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
  const Device device(table0);
  for_dtypes(table0.scalar_type(), weight_, bias_, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    float* mean = mutable_data<float>(stats);
    EmbeddingArgs<T, W> args{
        .tables = {},
        .table_count = int(sources.index.size()),
        .weight = weight.of<W>(),
        .bias = bias.of<W>(),
        .y = mutable_data<T>(y),
        .mean = mean,
        .rstd = mean + rows,
        .rows = rows,
        .d = d,
        .eps = float(eps),
        .dropout = dropout_of(dropout_p, seed),
    };
    const int64_t bytes = sizeof(T);
    bool is_wide = is_aligned({args.weight, args.bias, args.y}, {d * bytes});
    for (int i = 0; i < args.table_count; ++i) {
      const RowView& table = *sources.table[i];
      args.tables[i] = {data<T>(*table.tensor), table.stride, sources.table_rows[size_t(i)],
                        data<int64_t>(*sources.index[size_t(i)]),
                        sources.index[size_t(i)]->numel()};
      is_wide = is_wide && is_aligned({args.tables[i].data}, {table.stride * bytes});
    }
    constexpr int kPack = kWidest / int(sizeof(T));
    const RowGrid grid(rows, d, kPreferred);
    if (is_wide) return device.launch(embedding_kernel<T, W, kPack>, grid.grid, grid.block, args);
    device.launch(embedding_kernel<T, W, 1>, grid.grid, grid.block, args);
  });
  return {y, stats};
}

Choice choose_embedding_layer_norm_forward("embedding_layer_norm_forward", kFewRows, 0);

}  // namespace

LLMOS_CUDA_OPS(m) { own<choose_embedding_layer_norm_forward, &forward>(m); }

}  // namespace llmos
