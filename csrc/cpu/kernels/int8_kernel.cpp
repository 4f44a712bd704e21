// Products of int8: of many rows with a packed weight, of few with a weight as it lies.
#include "../int8.h"

#include "epilogue.h"
#include "gemv.h"

namespace llmos {
namespace {

using U = UnitOf<int8_t>;
constexpr int64_t kStrip = 4 * kLanes;             // Columns of out.
constexpr int64_t kGroup = kInTiles<U> ? 32 : 12;  // Rows that are finished while sums are near.

struct Pack {
  static constexpr int64_t kBlock = kStrip;
  const Int8Pack& a;
  const int64_t n;
  U* lines;

  Pack(const Int8Pack& a, Scratch scratch)
      : a(a), n(units<U>(a.inner)), lines(scratch.take<U>(kLanes * n)) {}
  static int64_t scratch(const Int8Pack& a) { return Scratch::size<U>(kLanes * units<U>(a.inner)); }

  void run(const ProductTask& task) {
    constexpr bool kInUnits = std::is_same_v<Element<U>, int8_t>;
    for (int64_t strip = task.begin; strip < task.end; ++strip) {
      U* to = static_cast<U*>(a.packed) + strip * n * kStrip;
      for (int64_t j = 0; j < kStrip; j += kLanes) {
        const U* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t row = strip * kStrip + j + i;
          rows[i] = lines + i * n;
          if (row >= a.outer)
            std::fill_n(lines + i * n, n, U{});
          else if (kInUnits && a.inner % kPerUnit<U> == 0)
            rows[i] = reinterpret_cast<const U*>(a.weight.at(row, 0));
          else
            pack_row(a.weight.at(row, 0), a.inner, n * kPerUnit<U>, lines + i * n);
        }
        transpose_rows(rows, n, to + j, kStrip);
      }
      add_offset(to, n * kStrip);
    }
  }
};

// z without its bias, of sums [row][step].
struct ScaledSums {
  const int32_t* sums;
  int64_t step;
  const float *input_scale, *weight_scale;
  const int32_t* offsets;  // Null, or of each row.
  const int32_t* zeros;    // Null, or of each column.
  const float* more;       // Null, or products of columns that are not int8, [row][step].

  [[gnu::always_inline]] F32 operator()(int64_t r, int64_t j, int64_t n) const {
    U32 sum = load_bits<U32>(sums + r * step + j);
    if (kOffset && offsets) sum -= uint32_t(offsets[r]);
    if (zeros) sum += load_lanes<U32>(zeros + j, n);
    F32 z = __builtin_convertvector(I32(sum), F32) * input_scale[r];
    if (more) z += load<F32>(more + r * step + j);
    return z * load_lanes<F32>(weight_scale + j, n);
  }
};

template <class T>
struct Product {
  static constexpr int64_t kBlock = kStrip;
  // Rows lie as units already.
  static constexpr bool kInUnits = std::is_same_v<Element<U>, int8_t>;
  const Int8Product<T>& a;
  const int64_t n;
  const bool far;         // Whether out is too large for the second cache, and few rows a group.
  U* left;                // [kBlockRows][unit]
  int32_t* sums;          // [kGroup][kStrip]
  float *weights, *more;  // Of outliers: [outlier][kStrip], and their products [kGroup][kStrip].

  Product(const Int8Product<T>& a, Scratch scratch)
      : a(a),
        n(units<U>(a.inner)),
        far(!kInTiles<U> && a.rows * a.outer * int64_t(sizeof(T)) > int64_t(1) << 20),
        left(scratch.take<U>(kBlockRows * n)),
        sums(scratch.take<int32_t>(kGroup * kStrip)),
        weights(scratch.take(a.outliers.count * kStrip)),
        more(scratch.take(kGroup * kStrip)) {}
  static int64_t scratch(const Int8Product<T>& a) {
    return Scratch::size<U>(kBlockRows * units<U>(a.inner)) +
           Scratch::size<int32_t>(kGroup * kStrip) + Scratch::size(a.outliers.count * kStrip) +
           Scratch::size(kGroup * kStrip);
  }

  void run(const ProductTask& task) {
    with_activation(a.epilogue.activation, [&](auto activation) {
      for (int64_t row = task.begin; row < task.end; row += kBlockRows)
        rows<activation>(row, std::min(kBlockRows, task.end - row), task.first, task.columns);
    });
  }

  template <Activation kActivation>
  void rows(int64_t first_row, int64_t rows, int64_t first, int64_t columns) {
    const U* from = left;
    int64_t step = n;
    if (kInUnits && (a.inner | a.input.row) % kPerUnit<U> == 0) {
      from = reinterpret_cast<const U*>(a.input.at(first_row, 0));
      step = a.input.row / kPerUnit<U>;
    } else {
      for (int64_t r = 0; r < rows; ++r)
        pack_row(a.input.at(first_row + r, 0), a.inner, n * kPerUnit<U>, left + r * n);
    }
    const Int8Outliers& outliers = a.outliers;
    for (int64_t j = first; j < first + columns; j += kStrip) {
      const U* right = static_cast<const U*>(a.packed) + j * n;
      const int64_t count = std::min(kStrip, first + columns - j);
      const int64_t vectors = to_vectors(count) / kLanes;
      if (outliers.count) unpack(right);
      for (int64_t r = 0; r < rows; r += kGroup) {
        const int64_t row = first_row + r, group = std::min(kGroup, rows - r);
        if (far) fetch(row, group, j, count);
        product<U, false, Into::Replace>(group, vectors, n, from + r * step, step, right, kStrip,
                                         sums, kStrip);
        if (outliers.count)
          product_in_parts<float, false, Into::Replace>(
              group, vectors, outliers.count, outliers.x + row * outliers.count, outliers.count,
              weights, kStrip, more, kStrip);
        finish<kActivation>(
            a, row, group, j, count,
            ScaledSums{sums, kStrip, a.input_scale + row, a.weight_scale + j,
                       a.offsets ? a.offsets + row : nullptr, a.zeros ? a.zeros + j : nullptr,
                       outliers.count ? more : nullptr});
      }
    }
  }

  // Lines that are written soon: few enough at a time for the core to have them all under way.
  void fetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    for (int64_t r = row; r < row + rows; ++r)
      for (int64_t j = 0; j < columns; j += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(a.out + r * a.outer + column + j, 1);
  }

  // A strip's weights of outliers.
  void unpack(const U* packed) {
    constexpr int kBits = 32 / kPerUnit<U>;
    for (int64_t i = 0; i < a.outliers.count; ++i) {
      const int64_t k = a.outliers.index[i];
      const int up = 32 - kBits * (1 + int(k % kPerUnit<U>));
      for (int64_t j = 0; j < kStrip; j += kLanes) {
        U32 units = load_bits<U32>(packed + k / kPerUnit<U> * kStrip + j);
        if (kOffset) units ^= 0x80808080;
        const I32 whole = I32(units << up) >> (32 - kBits);
        store(weights + i * kStrip + j, __builtin_convertvector(whole, F32));
      }
    }
  }
};

template <class T>
struct Few {
  using Products = FewRows<U, int8_t, kFewWithInt8>;
  static constexpr int64_t kBlock = Products::kBlock;
  const Int8Few<T>& a;
  Products products;

  Few(const Int8Few<T>& a, Scratch scratch) : a(a), products(scratch, a.input, a.rows, a.inner) {}
  static int64_t scratch(const Int8Few<T>& a) { return Products::scratch(a.inner); }

  void run(const ProductTask& task) {
    const ScaledSums sums{products.run(a.weight, task.begin, task.end),
                          kBlock,
                          a.input_scale,
                          a.weight_scale + task.begin,
                          nullptr,
                          a.zeros ? a.zeros + task.begin : nullptr,
                          nullptr};
    with_activation(a.epilogue.activation, [&](auto activation) {
      finish<activation>(a, 0, a.rows, task.begin, task.end - task.begin, sums);
    });
  }
};

template <class T>
struct Weight {
  using Products = FewRows<float, int8_t, kFewWithInt8>;
  static constexpr int64_t kBlock = Products::kBlock;
  const Int8Weight<T>& a;
  Products products;

  Weight(const Int8Weight<T>& a, Scratch scratch)
      : a(a), products(scratch, a.input, a.rows, a.inner) {}
  static int64_t scratch(const Int8Weight<T>& a) { return Products::scratch(a.inner); }

  void run(const ProductTask& task) {
    const float* sums = products.run(a.weight, task.begin, task.end);
    const float* scale = a.weight_scale + task.begin;
    const auto z = [=](int64_t r, int64_t j, int64_t n) {
      return load<F32>(sums + r * kBlock + j) * load_lanes<F32>(scale + j, n);
    };
    with_activation(a.epilogue.activation, [&](auto activation) {
      finish<activation>(a, 0, a.rows, task.begin, task.end - task.begin, z);
    });
  }
};

const BuildOf<Pack, Int8Pack> pack_build;
const KernelBuilds<Product, Int8Product, true> product_builds;
const KernelBuilds<Few, Int8Few, true> few_builds;
const KernelBuilds<Weight, Int8Weight> weight_builds;

}  // namespace
}  // namespace llmos
