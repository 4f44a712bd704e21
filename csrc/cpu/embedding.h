// Kernels for embedding_layer_norm: sums of embedding rows, and dropout;
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

template <class T>
inline IsaTable<SumEmbeddingsFn<T>> sum_embeddings;
template <class T>
inline IsaTable<DropRowsFn<T>> drop_rows;

}  // namespace llmos
