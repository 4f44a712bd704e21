#include "activations.h"
#include "gemm.h"
#include "philox.h"

namespace llmos {
namespace {

// Turns sums c [rows][kStrip] into rows of dinput, and adds these to column sums.
template <class T, Activation kActivation>
[[gnu::noinline]] void finish_dinput(const LinearDinput<T>& a, int64_t first, int64_t columns,
                                     int64_t begin, int64_t rows, const float* c, float* sums) {
  // The sign of a dropped y of relu tells already.
  const bool drops = a.epilogue.dropout.threshold && kActivation != Activation::Relu;
  const F32 scale = F32{} + a.epilogue.dropout.scale;
  float factors[kStrip];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (begin + i) * a.inner + first;
    if (drops) dropout_block(a.epilogue.dropout, begin + i, first, factors);
    const auto gradient = [&](F32 v, F32 kept, int64_t j) {
      v *= slope<kActivation>(kept);
      if (drops) return v * load<F32>(factors + j);
      return kActivation == Activation::Relu ? v * scale : v;
    };
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, columns - j);
      F32 v = load<F32>(c + i * kStrip + j);
      if (a.kept) v = gradient(v, load_lanes<F32>(a.kept + at + j, n), j);
      store_lanes(a.dinput + at + j, v, n);
      if (sums) store(sums + j, load<F32>(sums + j) + v);
    }
  }
}

template <class T>
struct Dinput {
  static constexpr int64_t kBlock = kStrip, kPanel = Panels<T>::kPanel;
  const LinearDinput<T>& a;
  Panels<T> panels;

  Dinput(const LinearDinput<T>& a, Scratch scratch) : a(a), panels(scratch) {}
  static int64_t scratch(const LinearDinput<T>&) { return Panels<T>::scratch(); }

  void run(const ProductTask& task) {
    float sums[kPanel / kStrip][kStrip] = {}, block[kStrip];
    with_activation(a.epilogue.activation, [&](auto activation) {
      panels.multiply(
          a.dout, a.weight, a.outer, task,
          [&](int64_t begin, int64_t rows, int64_t first, int64_t columns, const float* c) {
            // Blocks are added up apart: a long sum in one piece would lose digits.
            std::memset(block, 0, sizeof block);
            finish_dinput<T, activation>(a, first, columns, begin, rows, c,
                                         a.sums ? block : nullptr);
            if (!a.sums) return;
            float* chunk = sums[(first - task.first) / kStrip];
            for (int64_t j = 0; j < kStrip; ++j) chunk[j] += block[j];
            if ((begin + rows) % kChunkRows && begin + rows < a.rows) return;
            std::memcpy(a.sums + begin / kChunkRows * a.inner + first, chunk,
                        columns * sizeof(float));
            std::memset(chunk, 0, sizeof *sums);
          });
    });
  }
};

template <class T>
struct Dweight {
  static constexpr int64_t kBlock = kStrip, kPanel = Panels<T>::kPanel;
  static constexpr int64_t kFold = 8;  // Rows that are added up in one piece.
  const LinearDweight<T>& a;
  Panels<T> panels;

  Dweight(const LinearDweight<T>& a, Scratch scratch) : a(a), panels(scratch) {}
  static int64_t scratch(const LinearDweight<T>&) { return Panels<T>::scratch(); }

  void run(const ProductTask& task) {
    const Matrix<T> left{a.dout.data, a.dout.column, a.dout.row};
    // Without columns there is nothing to multiply: input may be null.
    const int64_t depth = task.columns ? a.rows : 0;
    panels.multiply(
        left, a.input, depth, task,
        [&](int64_t begin, int64_t rows, int64_t first, int64_t columns, const float* c) {
          for (int64_t i = 0; i < rows; ++i) {
            T* to = a.dweight + (begin + i) * a.inner + first;
            sweep(columns, [&](auto part, int64_t j) {
              store(to + j, load<typename decltype(part)::V>(c + i * kStrip + j));
            });
          }
        });
    if (a.dbias && task.first == 0) add_rows(task.begin, task.end);
  }

  // dbias of columns [begin, end) of dout.
  void add_rows(int64_t begin, int64_t end) {
    for (; begin < end; begin += kStrip) {
      const int64_t count = std::min(kStrip, end - begin);
      float total[kStrip];
      add_rows(begin, count, 0, a.rows, total);
      for (int64_t j = 0; j < count; ++j) store(a.dbias + begin + j, total[j]);
    }
  }

  // By halves: a long sum in one piece would lose digits.
  void add_rows(int64_t first, int64_t count, int64_t begin, int64_t end, float* sum) {
    if (end - begin > kFold) {
      const int64_t middle = begin + (end - begin) / 2;
      float other[kStrip];
      add_rows(first, count, begin, middle, sum);
      add_rows(first, count, middle, end, other);
      for (int64_t j = 0; j < count; ++j) sum[j] += other[j];
      return;
    }
    std::memset(sum, 0, kStrip * sizeof(float));
    for (int64_t r = begin; r < end; ++r) {
      const T* row = a.dout.at(r, first);
      if (a.dout.column == 1)
        sweep(count, [&](auto part, int64_t j) {
          using V = typename decltype(part)::V;
          store(sum + j, load<V>(sum + j) + load<V>(row + j));
        });
      else
        for (int64_t j = 0; j < count; ++j) sum[j] += load<float>(row + j * a.dout.column);
    }
  }
};

// Rows of y from z, or of dz from dy.
template <class T>
struct Activations {
  static constexpr int64_t kBlock = 16;  // Rows in a task.
  const Elementwise<T>& a;

  Activations(const Elementwise<T>& a, Scratch) : a(a) {}
  static int64_t scratch(const Elementwise<T>&) { return 0; }

  template <Activation kActivation>
  [[gnu::noinline]] void row(int64_t r) {
    const Dropout& dropout = a.epilogue.dropout;
    constexpr int64_t kWidth = 4 * kLanes;
    float factors[kWidth];
    for (int64_t at = 0; at < a.columns; at += kWidth) {
      if (dropout.threshold) dropout_block(dropout, r, at, factors);
      for (int64_t j = at; j < std::min(at + kWidth, a.columns); j += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, a.columns - j), from = r * a.columns + j;
        const F32 kept = load_lanes<F32>(a.kept + from, n);
        const F32 dout = a.dout ? load_lanes<F32>(a.dout + from, n) : F32{};
        F32 v = a.dout ? dout * slope<kActivation>(kept) : activate<kActivation>(kept);
        if (dropout.threshold) v *= load<F32>(factors + j - at);
        store_lanes(a.to + from, v, n);
      }
    }
  }

  void run(const ProductTask& task) {
    with_activation(a.epilogue.activation, [&](auto activation) {
      for (int64_t r = task.begin; r < task.end; ++r) row<decltype(activation)::value>(r);
    });
  }
};

const KernelBuilds<Dinput, LinearDinput> dinput_builds;
const KernelBuilds<Dweight, LinearDweight> dweight_builds;
const KernelBuilds<Activations, Elementwise> activation_builds;

}  // namespace
}  // namespace llmos
