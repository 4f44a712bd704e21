// The gradient kernels of linear layers, and the activation without a GEMM.
#include "activations.h"
#include "gemm.h"
#include "philox.h"

namespace llmos {
namespace {

// The epilogue of dinput: multiplies sums c [rows][kMicroPanel] by the derivative of the layer
// before, stores them, and adds them to column sums.
template <class T, Activation kActivation>
[[gnu::noinline]] void finish_dinput(const LinearDinputArgs<T>& a, int64_t first, int64_t columns,
                                     int64_t begin, int64_t rows, const float* c, float* sums) {
  // With relu, y = 0 also for dropped elements, so the mask is not needed.
  const bool drops = a.epilogue.dropout.threshold && kActivation != Activation::Relu;
  const F32 scale = F32{} + a.epilogue.dropout.scale;
  float factors[kMicroPanel];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (begin + i) * a.inner + first;
    if (drops) dropout_block(a.epilogue.dropout, begin + i, first, factors);
    const auto gradient = [&](F32 v, F32 saved, int64_t j) {
      v *= activation_derivative<kActivation>(saved);
      if (drops) return v * load<F32>(factors + j);
      return kActivation == Activation::Relu ? v * scale : v;
    };
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, columns - j);
      F32 v = load<F32>(c + i * kMicroPanel + j);
      if (a.saved) v = gradient(v, load_lanes<F32>(a.saved + at + j, n), j);
      store_lanes(a.dinput + at + j, v, n);
      if (sums) store(sums + j, load<F32>(sums + j) + v);
    }
  }
}

template <class T>
struct LinearDinputKernel {
  static constexpr int64_t kBlock = kMicroPanel, kPanel = PanelGemm<T>::kPanel;
  const LinearDinputArgs<T>& a;
  PanelGemm<T> gemm;

  LinearDinputKernel(const LinearDinputArgs<T>& a, Scratch scratch) : a(a), gemm(scratch) {}
  static int64_t scratch(const LinearDinputArgs<T>&) { return PanelGemm<T>::scratch(); }

  void run(const GemmTask& task) {
    float sums[kPanel / kMicroPanel][kMicroPanel] = {}, block[kMicroPanel];
    with_activation(a.epilogue.activation, [&](auto activation) {
      gemm.multiply(
          a.dout, a.weight, a.outer, task,
          [&](int64_t begin, int64_t rows, int64_t first, int64_t columns, const float* c) {
            // Each block of rows has its own partial sums: one long float32 sum would be less
            // precise.
            std::memset(block, 0, sizeof block);
            finish_dinput<T, activation>(a, first, columns, begin, rows, c,
                                         a.sums ? block : nullptr);
            if (!a.sums) return;
            float* chunk = sums[(first - task.first_column) / kMicroPanel];
            for (int64_t j = 0; j < kMicroPanel; ++j) chunk[j] += block[j];
            if ((begin + rows) % kChunkRows && begin + rows < a.rows) return;
            std::memcpy(a.sums + begin / kChunkRows * a.inner + first, chunk,
                        columns * sizeof(float));
            std::memset(chunk, 0, sizeof *sums);
          });
    });
  }
};

template <class T>
struct LinearDweightKernel {
  static constexpr int64_t kBlock = kMicroPanel, kPanel = PanelGemm<T>::kPanel;
  static constexpr int64_t kRowsPerSum = 8;  // Rows per partial sum of dbias.
  const LinearDweightArgs<T>& a;
  PanelGemm<T> gemm;

  LinearDweightKernel(const LinearDweightArgs<T>& a, Scratch scratch) : a(a), gemm(scratch) {}
  static int64_t scratch(const LinearDweightArgs<T>&) { return PanelGemm<T>::scratch(); }

  void run(const GemmTask& task) {
    const Matrix<T> left{a.dout.data, a.dout.column_stride, a.dout.row_stride};
    // With no columns the depth is 0: input may be a null pointer.
    const int64_t depth = task.columns ? a.rows : 0;
    gemm.multiply(left, a.input, depth, task,
                  [&](int64_t begin, int64_t rows, int64_t first, int64_t columns, const float* c) {
                    for (int64_t i = 0; i < rows; ++i) {
                      T* to = a.dweight + (begin + i) * a.inner + first;
                      sweep(columns, [&](auto part, int64_t j) {
                        store(to + j, load<typename decltype(part)::V>(c + i * kMicroPanel + j));
                      });
                    }
                  });
    if (a.dbias && task.first_column == 0) sum_rows(task.begin, task.end);
  }

  // Compute dbias for columns [begin, end) of dout.
  void sum_rows(int64_t begin, int64_t end) {
    for (; begin < end; begin += kMicroPanel) {
      const int64_t count = std::min(kMicroPanel, end - begin);
      float total[kMicroPanel];
      sum_rows(begin, count, 0, a.rows, total);
      for (int64_t j = 0; j < count; ++j) store(a.dbias + begin + j, total[j]);
    }
  }

  // Sum rows pairwise, by recursion: one long float32 sum would be less precise.
  void sum_rows(int64_t first, int64_t count, int64_t begin, int64_t end, float* sum) {
    if (end - begin > kRowsPerSum) {
      const int64_t middle = begin + (end - begin) / 2;
      float other[kMicroPanel];
      sum_rows(first, count, begin, middle, sum);
      sum_rows(first, count, middle, end, other);
      for (int64_t j = 0; j < count; ++j) sum[j] += other[j];
      return;
    }
    std::memset(sum, 0, kMicroPanel * sizeof(float));
    for (int64_t r = begin; r < end; ++r) {
      const T* row = a.dout.at(r, first);
      if (a.dout.column_stride == 1)
        sweep(count, [&](auto part, int64_t j) {
          using V = typename decltype(part)::V;
          store(sum + j, load<V>(sum + j) + load<V>(row + j));
        });
      else
        for (int64_t j = 0; j < count; ++j) sum[j] += load<float>(row + j * a.dout.column_stride);
    }
  }
};

// Computes rows of y from z, or of dz from dy.
template <class T>
struct ActivationKernel {
  static constexpr int64_t kBlock = 16;  // Rows in a task.
  const ActivationArgs<T>& a;

  ActivationKernel(const ActivationArgs<T>& a, Scratch) : a(a) {}
  static int64_t scratch(const ActivationArgs<T>&) { return 0; }

  template <Activation kActivation>
  [[gnu::noinline]] void row(int64_t r) {
    const Dropout& dropout = a.epilogue.dropout;
    constexpr int64_t kWidth = 4 * kLanes;
    float factors[kWidth];
    for (int64_t at = 0; at < a.columns; at += kWidth) {
      if (dropout.threshold) dropout_block(dropout, r, at, factors);
      for (int64_t j = at; j < std::min(at + kWidth, a.columns); j += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, a.columns - j), from = r * a.columns + j;
        const F32 saved = load_lanes<F32>(a.saved + from, n);
        const F32 dout = a.dout ? load_lanes<F32>(a.dout + from, n) : F32{};
        F32 v = a.dout ? dout * activation_derivative<kActivation>(saved)
                       : activate<kActivation>(saved);
        if (dropout.threshold) v *= load<F32>(factors + j - at);
        store_lanes(a.to + from, v, n);
      }
    }
  }

  void run(const GemmTask& task) {
    with_activation(a.epilogue.activation, [&](auto activation) {
      for (int64_t r = task.begin; r < task.end; ++r) row<decltype(activation)::value>(r);
    });
  }
};

const RegisterForDtypes<LinearDinputKernel, LinearDinputArgs> register_dinput;
const RegisterForDtypes<LinearDweightKernel, LinearDweightArgs> register_dweight;
const RegisterForDtypes<ActivationKernel, ActivationArgs> register_activation;

}  // namespace
}  // namespace llmos
