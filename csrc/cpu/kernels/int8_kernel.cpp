// The int8 kernels of linear layers: packing of the weight to VNNI layout, GEMM, GEMV, and GEMV
// with floating-point input (weight-only quantization).
#include "../int8.h"

#include "epilogue.h"
#include "gemv.h"
#include "int8_product.h"

namespace llmos {
namespace {

using U = WordOf<int8_t>;

struct Int8VnniWeightKernel {
  static constexpr int64_t kBlock = kMicroPanel;
  const Int8VnniWeightArgs& a;
  const int64_t n;
  Int8x4* row_buffer;

  Int8VnniWeightKernel(const Int8VnniWeightArgs& a, Scratch scratch)
      : a(a), n(words<Int8x4>(a.inner)), row_buffer(scratch.take<Int8x4>(kLanes * n)) {}
  static int64_t scratch(const Int8VnniWeightArgs& a) {
    return Scratch::size<Int8x4>(kLanes * words<Int8x4>(a.inner));
  }

  void run(const GemmTask& task) {
    for (int64_t micro_panel = task.begin; micro_panel < task.end; ++micro_panel) {
      Int8x4* to = static_cast<Int8x4*>(a.vnni_weight) + micro_panel * n * kMicroPanel;
      for (int64_t j = 0; j < kMicroPanel; j += kLanes) {
        const Int8x4* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t row = micro_panel * kMicroPanel + j + i;
          rows[i] = row_buffer + i * n;
          if (row >= a.outer)
            std::fill_n(row_buffer + i * n, n, Int8x4{});
          else if (a.inner % kPerWord<Int8x4> == 0)
            rows[i] = reinterpret_cast<const Int8x4*>(a.weight.at(row, 0));
          else
            pack_row(a.weight.at(row, 0), a.inner, n * kPerWord<Int8x4>, row_buffer + i * n);
        }
        transpose_rows(rows, n, to + j, kMicroPanel);
      }
      add_zero_point(to, n * kMicroPanel);
    }
  }
};

// Converts int32 sums [row][step] to z without its bias.
struct ScaledSums {
  const int32_t* sums;
  int64_t step;
  const float *input_scale, *weight_scale;
  const int32_t* row_corrections;     // Of each row, or null.
  const int32_t* column_corrections;  // Of each column, or null.
  const float* outlier_sums;          // Products of outlier columns, [row][step], or null.

  [[gnu::always_inline]] F32 operator()(int64_t r, int64_t j, int64_t n) const {
    U32 sum = load_bits<U32>(sums + r * step + j);
    if (kZeroPoint && row_corrections) sum -= uint32_t(row_corrections[r]);
    if (column_corrections) sum += load_lanes<U32>(column_corrections + j, n);
    F32 z = __builtin_convertvector(I32(sum), F32) * input_scale[r];
    if (outlier_sums) z += load<F32>(outlier_sums + r * step + j);
    return z * load_lanes<F32>(weight_scale + j, n);
  }
};

template <class T>
struct Int8GemmKernel {
  static constexpr int64_t kBlock = kMicroPanel, kPanel = Int8Product::kPanel;
  static constexpr int64_t kRows = Int8Product::kRows, kGroup = Int8Product::kGroup;
  const Int8GemmArgs<T>& a;
  // Whether to prefetch out: it is too large for the L2 cache, and a group has few rows.
  const bool prefetches;
  Int8Product product;
  // Weights of outliers, [outlier][kMicroPanel], and their products, [kGroup][kMicroPanel].
  float *weights, *outlier_sums;

  Int8GemmKernel(const Int8GemmArgs<T>& a, Scratch scratch)
      : a(a),
        prefetches(!kUsesAmx<U> && a.rows * a.outer * int64_t(sizeof(T)) > int64_t(1) << 20),
        product(scratch, a.inner),
        weights(scratch.take(a.outliers.count * kMicroPanel)),
        outlier_sums(scratch.take(kGroup * kMicroPanel)) {}
  static int64_t scratch(const Int8GemmArgs<T>& a) {
    return Int8Product::scratch(a.inner) + Scratch::size(a.outliers.count * kMicroPanel) +
           Scratch::size(kGroup * kMicroPanel);
  }

  void run(const GemmTask& task) {
    with_activation(a.epilogue.activation, [&](auto activation) {
      for (int64_t row = task.begin; row < task.end; row += kRows)
        rows<activation>(row, std::min(kRows, task.end - row), task.first_column, task.columns);
    });
  }

  template <Activation kActivation>
  void rows(int64_t first_row, int64_t rows, int64_t first, int64_t columns) {
    product.take_rows(a.input, first_row, rows);
    const Int8Outliers& outliers = a.outliers;
    for (int64_t j = first; j < first + columns; j += kMicroPanel) {
      const auto* panel = static_cast<const Int8x4*>(a.vnni_weight) + j * words<Int8x4>(a.inner);
      const int64_t count = std::min(kMicroPanel, first + columns - j);
      product.take_panel(panel, count);
      if (outliers.count) unpack_outlier_weights(panel);
      for (int64_t r = 0; r < rows; r += kGroup) {
        const int64_t row = first_row + r, group = std::min(kGroup, rows - r);
        if (prefetches) prefetch_out(row, group, j, count);
        const int32_t* sums = product.sums(r, group);
        if (outliers.count)
          small_gemm_in_parts<float, false, Update::Replace>(
              group, to_vectors(count) / kLanes, outliers.count,
              outliers.values + row * outliers.count, outliers.count, weights, kMicroPanel,
              outlier_sums, kMicroPanel);
        apply_epilogue<kActivation>(
            a, row, group, j, count,
            ScaledSums{sums, kMicroPanel, a.input_scale + row, a.weight_scale + j,
                       a.row_corrections ? a.row_corrections + row : nullptr,
                       a.column_corrections ? a.column_corrections + j : nullptr,
                       outliers.count ? outlier_sums : nullptr});
      }
    }
  }

  // Prefetch the cache lines of out that a group writes: few enough to be in flight at once.
  void prefetch_out(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    for (int64_t r = row; r < row + rows; ++r)
      for (int64_t j = 0; j < columns; j += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(a.out + r * a.outer + column + j, 1);
  }

  // Convert a micro-panel's weights of outlier columns to float32.
  void unpack_outlier_weights(const Int8x4* panel) {
    for (int64_t i = 0; i < a.outliers.count; ++i) {
      const int64_t k = a.outliers.index[i];
      const int shift = 24 - 8 * int(k % 4);
      for (int64_t j = 0; j < kMicroPanel; j += kLanes) {
        const U32 words = load_bits<U32>(panel + k / 4 * kMicroPanel + j) ^ 0x80808080;
        const I32 whole = I32(words << shift) >> 24;
        store(weights + i * kMicroPanel + j, __builtin_convertvector(whole, F32));
      }
    }
  }
};

template <class T>
struct Int8GemvKernel {
  using GemvOf = Gemv<U, int8_t, kInt8GemvMaxRows>;
  static constexpr int64_t kBlock = GemvOf::kBlock;
  const Int8GemvArgs<T>& a;
  GemvOf gemv;

  Int8GemvKernel(const Int8GemvArgs<T>& a, Scratch scratch)
      : a(a), gemv(scratch, a.input, a.rows, a.inner) {}
  static int64_t scratch(const Int8GemvArgs<T>& a) { return GemvOf::scratch(a.inner); }

  void run(const GemmTask& task) {
    const ScaledSums sums{gemv.run(a.weight, task.begin, task.end),
                          kBlock,
                          a.input_scale,
                          a.weight_scale + task.begin,
                          nullptr,
                          a.column_corrections ? a.column_corrections + task.begin : nullptr,
                          nullptr};
    with_activation(a.epilogue.activation, [&](auto activation) {
      apply_epilogue<activation>(a, 0, a.rows, task.begin, task.end - task.begin, sums);
    });
  }
};

template <class T>
struct Int8WeightOnlyKernel {
  using GemvOf = Gemv<float, int8_t, kInt8GemvMaxRows>;
  static constexpr int64_t kBlock = GemvOf::kBlock;
  const Int8WeightOnlyArgs<T>& a;
  GemvOf gemv;

  Int8WeightOnlyKernel(const Int8WeightOnlyArgs<T>& a, Scratch scratch)
      : a(a), gemv(scratch, a.input, a.rows, a.inner) {}
  static int64_t scratch(const Int8WeightOnlyArgs<T>& a) { return GemvOf::scratch(a.inner); }

  void run(const GemmTask& task) {
    const float* sums = gemv.run(a.weight, task.begin, task.end);
    const float* scale = a.weight_scale + task.begin;
    const auto z = [=](int64_t r, int64_t j, int64_t n) {
      return load<F32>(sums + r * kBlock + j) * load_lanes<F32>(scale + j, n);
    };
    with_activation(a.epilogue.activation, [&](auto activation) {
      apply_epilogue<activation>(a, 0, a.rows, task.begin, task.end - task.begin, z);
    });
  }
};

const RegisterTaskKernel<Int8VnniWeightKernel, Int8VnniWeightArgs> register_vnni_weight;
const RegisterForDtypes<Int8GemmKernel, Int8GemmArgs, true> register_gemm;
const RegisterForDtypes<Int8GemvKernel, Int8GemvArgs, true> register_gemv;
const RegisterForDtypes<Int8WeightOnlyKernel, Int8WeightOnlyArgs> register_weight_only;

}  // namespace
}  // namespace llmos
