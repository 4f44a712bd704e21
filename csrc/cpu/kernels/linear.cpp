#include "panel_forward.h"

namespace llmos {
namespace {

template <class T>
using Forward = PanelForward<T, LinearForward<T>, StoredSums>;

template <class T>
void finish_few(const LinearForward<T>& a, int64_t begin, int64_t count, const float* sums,
                int64_t step) {
  with_activation(a.epilogue.activation, [&](auto activation) {
    finish<activation>(a, 0, a.rows, begin, count, StoredSums{a, 0, begin, sums, step});
  });
}

// Rows of the weight are read once, where they lie.
template <class T>
struct Few {
  using U = UnitOf<T>;
  static constexpr int64_t kBlock = 16 * kLanes;          // Columns of out in a task.
  static constexpr int64_t kStep = kLanes * kPerUnit<U>;  // Elements in a vector of units.
  static constexpr int64_t kFold = 64;                    // Vectors after which a sum starts anew.
  const LinearFew<T>& a;
  const int64_t whole;  // Elements of a row in whole vectors.
  U* x;                 // [row][unit], zeros up to a whole vector.
  float* sums;          // [row][kBlock]

  Few(const LinearFew<T>& a, Scratch scratch)
      : a(a),
        whole(a.inner / kStep * kStep),
        x(scratch.take<U>(kFewRows * width(a))),
        sums(scratch.take(kFewRows * kBlock)) {
    for (int64_t r = 0; r < a.rows; ++r)
      pack_row(a.input.at(r, 0), a.inner, width(a) * kPerUnit<U>, x + r * width(a));
  }
  static int64_t width(const LinearFew<T>& a) { return to_vectors(units<U>(a.inner)); }
  static int64_t scratch(const LinearFew<T>& a) {
    return Scratch::size<U>(kFewRows * width(a)) + Scratch::size(kFewRows * kBlock);
  }

  static U32 vector(const T* p) {
    if constexpr (kPerUnit<U> == 2)
      return load_bits<U32>(p);
    else
      return std::bit_cast<U32>(load<F32>(p));
  }

  // Products of kRows rows of x and kN rows of the weight from `first` on.
  template <int kRows, int kN>
  [[gnu::noinline]] void columns(int64_t first, float* to) {
    const T* w[kN];
    F32 total[kRows][kN] = {};
    for (int n = 0; n < kN; ++n) w[n] = a.weight.at(first + n, 0);
    const int64_t step = width(a);
    for (int64_t k = 0; k < whole;) {
      F32 sum[kRows][kN] = {};
      const int64_t stop = std::min(k + kFold * kStep, whole);
      for (; k < stop; k += kStep) {
        U32 left[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) left[r] = load_bits<U32>(x + r * step + k / kPerUnit<U>);
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) {
          const U32 right = vector(w[n] + k);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) sum[r][n] = multiply_add<U>(left[r], right, sum[r][n]);
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kN; ++n) total[r][n] += sum[r][n];
    }
    for (int n = 0; n < kN; ++n) {
      T tail[kStep] = {};
      std::memcpy(tail, w[n] + whole, (a.inner - whole) * sizeof(T));
      for (int r = 0; r < kRows; ++r) {
        F32 sum = total[r][n];
        if (whole < a.inner)
          sum = multiply_add<U>(load_bits<U32>(x + r * step + whole / kPerUnit<U>), vector(tail),
                                sum);
        to[r * kBlock + n] = horizontal_sum(sum);
      }
    }
  }

  template <int kRows>
  void run_rows(int64_t begin, int64_t end) {
    int64_t at = begin;
    constexpr int kN = kRows > 2 && kLanes < 16 ? 2 : 4;
    for (; at + kN <= end; at += kN) columns<kRows, kN>(at, sums + at - begin);
    for (; at < end; ++at) columns<kRows, 1>(at, sums + at - begin);
  }

  void run(const ProductTask& task) {
    switch (a.rows) {
      case 1:
        run_rows<1>(task.begin, task.end);
        break;
      case 2:
        run_rows<2>(task.begin, task.end);
        break;
      case 3:
        run_rows<3>(task.begin, task.end);
        break;
      default:
        run_rows<4>(task.begin, task.end);
    }
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
