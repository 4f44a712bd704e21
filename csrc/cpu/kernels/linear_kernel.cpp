// The forward kernels of linear layers: GEMM, and two GEMVs for few rows.
#include "epilogue.h"
#include "gemm.h"
#include "gemv.h"

namespace llmos {
namespace {

template <class T>
struct LinearForwardKernel {
  static constexpr int64_t kBlock = kMicroPanel, kPanel = PanelGemm<T>::kPanel;
  const LinearForwardArgs<T>& a;
  PanelGemm<T> gemm;
  float* transposed;  // Transposed sums of a block, [row of input][row of the weight].

  LinearForwardKernel(const LinearForwardArgs<T>& a, Scratch scratch)
      : a(a), gemm(scratch), transposed(scratch.take(kMicroPanel * kBlockRows)) {}
  static int64_t scratch(const LinearForwardArgs<T>&) {
    return PanelGemm<T>::scratch() + Scratch::size(kMicroPanel * kBlockRows);
  }

  void run(const GemmTask& task) {
    with_activation(a.epilogue.activation, [&](auto activation) {
      a.transposed ? run_transposed<activation>(task) : run<activation>(task);
    });
  }

  template <Activation kActivation>
  void run(const GemmTask& task) {
    const Matrix<T> right{a.weight.data, a.weight.column_stride, a.weight.row_stride};
    gemm.multiply(
        a.input, right, a.inner, task,
        [&](int64_t begin, int64_t rows, int64_t first, int64_t columns, const float* c) {
          apply_epilogue<kActivation>(a, begin, rows, first, columns, StoredSums{c, kMicroPanel});
        },
        static_cast<const WordOf<T>*>(a.panels));
  }

  // The weight is the left operand; panels consist of rows of the input.
  template <Activation kActivation>
  void run_transposed(const GemmTask& task) {
    const Matrix<T> right{a.input.data, a.input.column_stride, a.input.row_stride};
    gemm.multiply(a.weight, right, a.inner, task,
                  [&](int64_t begin, int64_t count, int64_t first, int64_t rows, const float* c) {
                    transpose_sums(c, kMicroPanel, count, rows, transposed, kBlockRows);
                    apply_epilogue<kActivation>(a, first, rows, begin, count,
                                                StoredSums{transposed, kBlockRows});
                  });
  }
};

template <class T>
struct LinearPanelsKernel {
  static constexpr int64_t kBlock = kMicroPanel;
  const LinearPanelsArgs<T>& a;
  PanelGemm<T> gemm;

  LinearPanelsKernel(const LinearPanelsArgs<T>& a, Scratch scratch) : a(a), gemm(scratch) {}
  static int64_t scratch(const LinearPanelsArgs<T>&) { return PanelGemm<T>::scratch(); }

  void run(const GemmTask& task) {
    const Matrix<T> right{a.weight.data, a.weight.column_stride, a.weight.row_stride};
    gemm.pack_whole(right, a.inner, task.begin, task.end - task.begin,
                    static_cast<WordOf<T>*>(a.panels));
  }
};

template <class T>
int64_t bytes_of_panels(int64_t inner, int64_t outer) {
  return PanelGemm<T>::packed_words(inner, outer) * int64_t(sizeof(WordOf<T>));
}

template <class T>
void apply_gemv_epilogue(const LinearForwardArgs<T>& a, int64_t begin, int64_t count,
                         const float* sums, int64_t step) {
  with_activation(a.epilogue.activation, [&](auto activation) {
    apply_epilogue<activation>(a, 0, a.rows, begin, count, StoredSums{sums, step});
  });
}

template <class T>
struct LinearGemvKernel {
  using GemvOf = Gemv<WordOf<T>, T, kGemvMaxRows>;
  static constexpr int64_t kBlock = GemvOf::kBlock;
  const LinearGemvArgs<T>& a;
  GemvOf gemv;

  LinearGemvKernel(const LinearGemvArgs<T>& a, Scratch scratch)
      : a(a), gemv(scratch, a.input, a.rows, a.inner) {}
  static int64_t scratch(const LinearGemvArgs<T>& a) { return GemvOf::scratch(a.inner); }

  void run(const GemmTask& task) {
    const float* sums = gemv.run(a.weight, task.begin, task.end);
    apply_gemv_epilogue<T>(a, task.begin, task.end - task.begin, sums, kBlock);
  }
};

// GEMV with a weight stored by columns: adds up the columns whose input is not 0, read in place.
template <class T>
struct LinearSparseGemvKernel {
  static constexpr int64_t kBlock = 2048;        // Columns of out (rows of the weight) in a task.
  static constexpr int64_t kColumnsPerSum = 64;  // Columns of the weight per partial sum.
  const LinearSparseGemvArgs<T>& a;
  float *sums, *partial;  // [row][kBlock]

  LinearSparseGemvKernel(const LinearSparseGemvArgs<T>& a, Scratch scratch)
      : a(a),
        sums(scratch.take(kGemvMaxRows * kBlock)),
        partial(scratch.take(kGemvMaxRows * kBlock)) {}
  static int64_t scratch(const LinearSparseGemvArgs<T>&) {
    return 2 * Scratch::size(kGemvMaxRows * kBlock);
  }

  // Add kN columns, from position `at` of the index on, to the partial sums.
  template <int kN>
  [[gnu::noinline]] void add(int64_t at, int64_t begin, int64_t count) {
    const T* w[kN];
    for (int n = 0; n < kN; ++n) w[n] = a.weight.at(begin, a.index[at + n]);
    for (int64_t r = 0; r < a.rows; ++r) {
      float* to = partial + r * kBlock;
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

  void run(const GemmTask& task) {
    const int64_t count = task.end - task.begin;
    std::memset(sums, 0, kGemvMaxRows * kBlock * sizeof(float));
    for (int64_t from = 0; from < a.count; from += kColumnsPerSum) {
      std::memset(partial, 0, kGemvMaxRows * kBlock * sizeof(float));
      int64_t at = from;
      const int64_t stop = std::min(from + kColumnsPerSum, a.count);
      for (; at + 4 <= stop; at += 4) add<4>(at, task.begin, count);
      for (; at < stop; ++at) add<1>(at, task.begin, count);
      for (int64_t r = 0; r < a.rows; ++r)
        sweep(count, [&](auto p, int64_t i) {
          using V = typename decltype(p)::V;
          float* to = sums + r * kBlock + i;
          store(to, load<V>(to) + load<V>(partial + r * kBlock + i));
        });
    }
    apply_gemv_epilogue<T>(a, task.begin, count, sums, kBlock);
  }
};

template <class T, bool kRegister = kIsaBenefits<T>>
struct RegisterPanelBytes {
  Register<int64_t (*)(int64_t, int64_t)> bytes{LLMOS_ISA, panel_bytes<T>, &bytes_of_panels<T>};
};
template <class T>
struct RegisterPanelBytes<T, false> {};

const RegisterPanelBytes<float> register_bytes_f32;
const RegisterPanelBytes<bf16> register_bytes_bf16;
const RegisterPanelBytes<f16> register_bytes_f16;
const RegisterForDtypes<LinearForwardKernel, LinearForwardArgs> register_forward;
const RegisterForDtypes<LinearPanelsKernel, LinearPanelsArgs> register_panels;
const RegisterForDtypes<LinearGemvKernel, LinearGemvArgs> register_gemv;
const RegisterForDtypes<LinearSparseGemvKernel, LinearSparseGemvArgs> register_sparse_gemv;

}  // namespace
}  // namespace llmos
