// The kernels of embedding_layer_norm: sums of embedding rows, dropout of rows, gradients of
// tables.
#include "../embedding.h"

#include <type_traits>

#include "philox.h"
#include "vec.h"

namespace llmos {
namespace {

template <class T>
const T* row_of(const EmbeddingTable<T>& e, int64_t row) {
  return e.data + e.index[row % e.count] * e.stride;
}

template <class T>
[[gnu::flatten]] void sum(const EmbeddingSumArgs<T>& a, int64_t begin, int64_t end, T* h) {
  const int64_t d = a.d;
  // One loop for each number of tables.
  const auto run = [&](auto tables) {
    for (int64_t row = begin; row < end; ++row, h += d) {
      const T* first = row_of(a.tables[0], row);
      const T* second = tables > 1 ? row_of(a.tables[1], row) : nullptr;
      const T* third = tables > 2 ? row_of(a.tables[2], row) : nullptr;
      T* out = h;
      sweep(d, [=](auto part, int64_t i) {
        using V = typename decltype(part)::V;
        V v = load<V>(first + i);
        if constexpr (tables > 1) v = store_rounded(out + i, v + load<V>(second + i));
        if constexpr (tables > 2) v += load<V>(third + i);
        store(out + i, v);
      });
    }
  };
  if (a.table_count == 1) return run(std::integral_constant<int, 1>{});
  if (a.table_count == 2) return run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 3>{});
}

template <class T>
[[gnu::flatten]] void drop(const Dropout& dropout, const T* x, int64_t stride, int64_t begin,
                           int64_t end, int64_t d, T* out) {
  for (int64_t row = begin; row < end; ++row, x += stride, out += d) {
    for_each_dropout_block(dropout, row, d, [&](int64_t at, int64_t count, const float* factors) {
      sweep(count, [&](auto part, int64_t i) {
        using V = typename decltype(part)::V;
        store(out + at + i, load<V>(x + at + i) * load<V>(factors + i));
      });
    });
  }
}

template <class T>
[[gnu::flatten]] void sum_table(const TableGradientArgs<T>& a, int64_t first, float* sums, T* out) {
  const auto sweep_row = [&](int64_t row, auto body) {
    const T* dh = a.dh + row * a.stride + a.begin;
    sweep(a.end - a.begin, [&](auto part, int64_t i) {
      using V = typename decltype(part)::V;
      body(i, load<V>(dh + i));
    });
  };
  const int64_t second = a.next[first];
  out += a.begin;
  if (second < 0) return sweep_row(first, [=](int64_t i, auto v) { store(out + i, v); });
  sweep_row(first, [=](int64_t i, auto v) { store(sums + i, v); });
  for (int64_t row = second; row >= 0; row = a.next[row])
    sweep_row(row, [=](int64_t i, auto v) { store(sums + i, load<decltype(v)>(sums + i) + v); });
  sweep(a.end - a.begin,
        [=](auto part, int64_t i) { store(out + i, load<typename decltype(part)::V>(sums + i)); });
}

template <class T, bool kRegister = kIsaBenefits<T>>
struct RegisterEmbeddingKernels {
  Register<SumTableRowFn<T>> table_{LLMOS_ISA, sum_table_row<T>, &sum_table<T>};
  Register<SumEmbeddingsFn<T>> sum_{LLMOS_ISA, sum_embeddings<T>, &sum<T>};
  Register<DropRowsFn<T>> drop_{LLMOS_ISA, drop_rows<T>, &drop<T>};
};
template <class T>
struct RegisterEmbeddingKernels<T, false> {};

const RegisterEmbeddingKernels<float> register_f32;
const RegisterEmbeddingKernels<bf16> register_bf16;
const RegisterEmbeddingKernels<f16> register_f16;

}  // namespace
}  // namespace llmos
