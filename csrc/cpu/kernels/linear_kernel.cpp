#include "epilogue.h"
#include "gemv.h"
#include "gemm.h"

namespace llmos {
namespace {

template <class T>
struct Forward {
  static constexpr int64_t kBlock = kStrip, kPanel = Panels<T>::kPanel;
  const LinearForward<T>& a;
  Panels<T> panels;
  float* turned;  // [row of input][row of the weight]: sums of a block.

  Forward(const LinearForward<T>& a, Scratch scratch)
      : a(a), panels(scratch), turned(scratch.take(kStrip * kBlockRows)) {}
  static int64_t scratch(const LinearForward<T>&) {
    return Panels<T>::scratch() + Scratch::size(kStrip * kBlockRows);
  }

  void run(const ProductTask& task) {
    with_activation(a.epilogue.activation, [&](auto activation) {
      a.turned ? run_turned<activation>(task) : run<activation>(task);
    });
  }

  template <Activation kActivation>
  void run(const ProductTask& task) {
    const Matrix<T> right{a.weight.data, a.weight.column, a.weight.row};
    panels.multiply(
        a.input, right, a.inner, task,
        [&](int64_t begin, int64_t rows, int64_t first, int64_t columns, const float* c) {
          finish<kActivation>(a, begin, rows, first, columns, StoredSums{c, kStrip});
        });
  }

  // The weight is the left operand, the rows of input are columns of panels.
  template <Activation kActivation>
  void run_turned(const ProductTask& task) {
    const Matrix<T> right{a.input.data, a.input.column, a.input.row};
    panels.multiply(a.weight, right, a.inner, task,
                    [&](int64_t begin, int64_t count, int64_t first, int64_t rows, const float* c) {
                      turn_sums(c, kStrip, count, rows, turned, kBlockRows);
                      finish<kActivation>(a, first, rows, begin, count,
                                          StoredSums{turned, kBlockRows});
                    });
  }
};

template <class T>
void finish_few(const LinearForward<T>& a, int64_t begin, int64_t count, const float* sums,
                int64_t step) {
  with_activation(a.epilogue.activation, [&](auto activation) {
    finish<activation>(a, 0, a.rows, begin, count, StoredSums{sums, step});
  });
}

template <class T>
struct Few {
  using Products = FewRows<UnitOf<T>, T, kFewRows>;
  static constexpr int64_t kBlock = Products::kBlock;
  const LinearFew<T>& a;
  Products products;

  Few(const LinearFew<T>& a, Scratch scratch) : a(a), products(scratch, a.input, a.rows, a.inner) {}
  static int64_t scratch(const LinearFew<T>& a) { return Products::scratch(a.inner); }

  void run(const ProductTask& task) {
    const float* sums = products.run(a.weight, task.begin, task.end);
    finish_few<T>(a, task.begin, task.end - task.begin, sums, kBlock);
  }
};

// Columns of the weight whose input is not 0, added up where they lie.
template <class T>
struct Columns {
  static constexpr int64_t kBlock = 2048;  // Columns of out in a task: rows of the weight.
  static constexpr int64_t kFold = 64;     // Columns of the weight after which a sum starts anew.
  const LinearColumns<T>& a;
  float *sums, *part;  // [row][kBlock]

  Columns(const LinearColumns<T>& a, Scratch scratch)
      : a(a), sums(scratch.take(kFewRows * kBlock)), part(scratch.take(kFewRows * kBlock)) {}
  static int64_t scratch(const LinearColumns<T>&) { return 2 * Scratch::size(kFewRows * kBlock); }

  // Adds kN columns, from place `at` of the index on, to part.
  template <int kN>
  [[gnu::noinline]] void add(int64_t at, int64_t begin, int64_t count) {
    const T* w[kN];
    for (int n = 0; n < kN; ++n) w[n] = a.weight.at(begin, a.index[at + n]);
    for (int64_t r = 0; r < a.rows; ++r) {
      float* to = part + r * kBlock;
      float x[kN];
      for (int n = 0; n < kN; ++n) x[n] = a.x[(at + n) * a.rows + r];
      sweep(count, [&](auto p, int64_t i) {
        using V = typename decltype(p)::V;
        V sum = load<V>(to + i);
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) sum = fma(load<V>(w[n] + i), V{} + x[n], sum);
        store(to + i, sum);
      });
    }
  }

  void run(const ProductTask& task) {
    const int64_t count = task.end - task.begin;
    std::memset(sums, 0, kFewRows * kBlock * sizeof(float));
    for (int64_t from = 0; from < a.count; from += kFold) {
      std::memset(part, 0, kFewRows * kBlock * sizeof(float));
      int64_t at = from;
      const int64_t stop = std::min(from + kFold, a.count);
      for (; at + 4 <= stop; at += 4) add<4>(at, task.begin, count);
      for (; at < stop; ++at) add<1>(at, task.begin, count);
      for (int64_t r = 0; r < a.rows; ++r)
        sweep(count, [&](auto p, int64_t i) {
          using V = typename decltype(p)::V;
          float* to = sums + r * kBlock + i;
          store(to, load<V>(to) + load<V>(part + r * kBlock + i));
        });
    }
    finish_few<T>(a, task.begin, count, sums, kBlock);
  }
};

const KernelBuilds<Forward, LinearForward> forward_builds;
const KernelBuilds<Few, LinearFew> few_builds;
const KernelBuilds<Columns, LinearColumns> columns_builds;

}  // namespace
}  // namespace llmos
