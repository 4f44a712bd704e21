// Sums of embedding rows, and dropout of rows; formulas in llmos_kernels/ops/embedding.py.
#pragma once

#include <cstdint>

#include "isa_table.h"
#include "dropout.h"

namespace llmos {

constexpr int kMaxTables = 3;

// Of row r: table[index[r % count]].
template <class T>
struct Embedding {
  const T* table;
  int64_t stride;
  const int64_t* index;
  int64_t count;
};

template <class T>
struct EmbeddingSum {
  Embedding<T> of[kMaxTables] = {};
  int tables;
  int64_t d;
};

// h [end - begin, d] = the sums of rows [begin, end), rounded after each addition.
template <class T>
using SumEmbeddings = void (*)(const EmbeddingSum<T>&, int64_t begin, int64_t end, T* h);

// out [end - begin, d] = dropout(x), whose rows [begin, end) are `stride` apart; may be x itself.
template <class T>
using DropRows = void (*)(const Dropout&, const T* x, int64_t stride, int64_t begin, int64_t end,
                          int64_t d, T* out);

template <class T>
inline Dispatch<SumEmbeddings<T>> sum_embeddings;
template <class T>
inline Dispatch<DropRows<T>> drop_rows;

}  // namespace llmos
