// Kernels for embedding_layer_norm: sums of embedding rows, dropout, gradients of tables;
// llmos_kernels/ops/embedding.py has the formulas.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "isa_table.h"

namespace llmos {

constexpr int kMaxTables = 3;

// Row r of the sum takes row index[r % count] of the table.
template <class T>
struct EmbeddingTable {
  const T* data;
  int64_t stride;
  const int64_t* index;
  int64_t count;
};

template <class T>
struct EmbeddingSumArgs {
  EmbeddingTable<T> tables[kMaxTables] = {};
  int table_count;
  int64_t d;
};

// Write the sums of rows [begin, end) to h [end - begin, d], rounded after each addition.
template <class T>
using SumEmbeddingsFn = void (*)(const EmbeddingSumArgs<T>&, int64_t begin, int64_t end, T* h);

// Apply dropout to rows [begin, end) of x, `stride` elements apart, and writes out [end - begin,
// d]. out may be x.
template <class T>
using DropRowsFn = void (*)(const Dropout&, const T* x, int64_t stride, int64_t begin, int64_t end,
                            int64_t d, T* out);

// Columns [begin, end) of the gradient of a table. Row r of dh is one of the rows that its index
// took from the table; next[r] is the next of the same, -1 after the last.
template <class T>
struct TableGradientArgs {
  const T* dh;
  int64_t stride;
  const int64_t* next;
  int64_t d, begin, end;
};

// Write the sum, in float32, of the rows of dh from `first` on to a row of the table's gradient.
// `sums` [d] is scratch.
template <class T>
using SumTableRowFn = void (*)(const TableGradientArgs<T>&, int64_t first, float* sums, T* out);

template <class T>
inline IsaTable<SumTableRowFn<T>> sum_table_row;
template <class T>
inline IsaTable<SumEmbeddingsFn<T>> sum_embeddings;
template <class T>
inline IsaTable<DropRowsFn<T>> drop_rows;

}  // namespace llmos
