// Int8Product: the exact int32 sums of int8 rows times the micro-panels of a weight in VNNI layout.
//
// With VNNI or AMX the rows are multiplied as they are. Other ISAs multiply int16, by Winograd's
// inner product ("A New Algorithm for Inner Product", IEEE Trans. Computers C-17, 1968):
//
//     a0 b0 + a1 b1 = (a0 + b1) (a1 + b0) - a0 a1 - b0 b1
//
// The last two terms belong to a row or a column alone: they are summed once, as corrections, and
// what is left has half of the multiplications. CPUs add more vectors in a cycle than they
// multiply: Zen 4 multiplies 32 pairs in a cycle so, 25.6 with vpmaddwd and vpaddd alone. Sums may
// wrap; the result fits int32, so it is exact.
#pragma once

#include "microkernel.h"
#include "register_kernel.h"

namespace llmos {
namespace {

constexpr int64_t kMicroPanel = 64;  // Columns of out in a micro-panel of the VNNI layout.

#if defined(__AVX512VNNI__)

class Int8Product {
 public:
  static constexpr int64_t kRows = kBlockRows;  // The most rows of take_rows().
  // The most rows of sums(): those whose sums are in the L1 cache for the epilogue.
  static constexpr int64_t kGroup = kUsesAmx<Int8x4> ? 32 : 12;
  static constexpr int64_t kPanel = 2 * kMicroPanel;

  Int8Product(Scratch& scratch, int64_t inner)
      : inner_(inner),
        words_(words<Int8x4>(inner)),
        packed_(scratch.take<Int8x4>(kRows * words_)),
        sums_(scratch.take<int32_t>(kGroup * kMicroPanel)) {}
  static int64_t scratch(int64_t inner) {
    return Scratch::size<Int8x4>(kRows * words<Int8x4>(inner)) +
           Scratch::size<int32_t>(kGroup * kMicroPanel);
  }

  // Multiply these rows of the input from now on. Aligned rows are in VNNI layout as they are.
  void take_rows(const Matrix<int8_t>& input, int64_t first, int64_t rows) {
    constexpr int64_t kPer = kPerWord<Int8x4>;
    left_ = packed_;
    step_ = words_;
    if ((inner_ | input.row_stride) % kPer == 0) {
      left_ = reinterpret_cast<const Int8x4*>(input.at(first, 0));
      step_ = input.row_stride / kPer;
      return;
    }
    for (int64_t r = 0; r < rows; ++r)
      pack_row(input.at(first + r, 0), inner_, words_ * kPer, packed_ + r * words_);
  }

  // Multiply them by `columns` columns of this micro-panel of the weight from now on.
  void take_panel(const Int8x4* panel, int64_t columns) {
    panel_ = panel;
    vectors_ = to_vectors(columns) / kLanes;
  }

  // Return the sums [rows][kMicroPanel] from row `row` of those taken on. The zero point of the
  // weight is in them.
  const int32_t* sums(int64_t row, int64_t rows) {
    small_gemm<Int8x4, false, Update::Replace>(rows, vectors_, words_, left_ + row * step_, step_,
                                               panel_, kMicroPanel, sums_, kMicroPanel);
    return sums_;
  }

 private:
  const int64_t inner_, words_;
  Int8x4* packed_;  // [kRows][word]
  int32_t* sums_;   // [kGroup][kMicroPanel]
  const Int8x4 *left_ = nullptr, *panel_ = nullptr;
  int64_t step_ = 0, vectors_ = 0;
};

#else

// A word of VNNI layout becomes two words of int16: its elements 0 and 2, and 1 and 3.
class Int8Product {
 public:
  static constexpr int64_t kRows = 192, kGroup = 12, kPanel = 4 * kMicroPanel;

  Int8Product(Scratch& scratch, int64_t inner)
      : inner_(inner),
        depth_(words<Int8x4>(inner)),
        left_(scratch.take<Int16x2>(kRows * 2 * depth_)),
        right_(scratch.take<Int16x2>(kPartDepth * 2 * kStep)),
        row_corrections_(scratch.take<int32_t>(kRows)),
        column_corrections_(scratch.take<int32_t>(kStep)),
        sums_(scratch.take<int32_t>(kRows * kMicroPanel)) {}
  static int64_t scratch(int64_t inner) {
    return Scratch::size<Int16x2>(kRows * 2 * words<Int8x4>(inner)) +
           Scratch::size<Int16x2>(kPartDepth * 2 * kStep) + Scratch::size<int32_t>(kRows) +
           Scratch::size<int32_t>(kStep) + Scratch::size<int32_t>(kRows * kMicroPanel);
  }

  void take_rows(const Matrix<int8_t>& input, int64_t first, int64_t rows) {
    if (first == first_ && rows == rows_) return;  // Those of the task before.
    first_ = first;
    rows_ = rows;
    for (int64_t r = 0; r < rows; ++r)
      row_corrections_[r] = widen_row(input.at(first + r, 0), left_ + r * 2 * depth_);
  }

  void take_panel(const Int8x4* panel, int64_t columns) {
    if (depth_ == 0) std::memset(sums_, 0, rows_ * kMicroPanel * sizeof(int32_t));
    for (int64_t k = 0; k < depth_; k += kPartDepth) {
      const int64_t end = std::min(k + kPartDepth, depth_);
      for (int64_t j = 0; j < columns; j += kStep) {
        const Int8x4* part = panel + k * kMicroPanel + j;
        const Int8x4* next = j + kStep < columns ? part + kStep : panel + end * kMicroPanel;
        widen_weight(part, end - k, next);
        multiply(k, end - k, j);
      }
    }
  }

  const int32_t* sums(int64_t row, int64_t) const { return sums_ + row * kMicroPanel; }

 private:
  // A block of registers has kBlock rows and kN vectors. The part of the weight for it, kPartDepth
  // words deep, fits in the L1 cache.
  static constexpr int kBlock = 4, kN = 2;
  static constexpr int64_t kStep = kN * kLanes, kPartDepth = 2048 / kStep;

  // Widen a row to [word][2], and return the sum of e0 e1 + e2 e3 of its words.
  int32_t widen_row(const int8_t* from, Int16x2* to) const {
    constexpr int64_t kElements = 2 * kLanes;
    U32 doubled{};
    const auto widen = [&](const int8_t* p, int64_t k, int64_t bytes) {
      const I16 wide = __builtin_convertvector(swap_middle(load_bits<I8>(p)), I16);
      std::memcpy(to + k / 2, &wide, bytes);
      doubled = multiply_add<Int16x2>(U32(wide), swap_pairs(U32(wide)), doubled);
    };
    int64_t k = 0;
    for (; k + kElements <= inner_; k += kElements) widen(from + k, k, sizeof(I16));
    if (k < inner_) {
      int8_t tail[kElements] = {};
      std::memcpy(tail, from + k, inner_ - k);
      widen(tail, k, (depth_ * 4 - k) * 2);
    }
    uint32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += doubled[i];
    return int32_t(sum) / 2;
  }

  // Widen kStep columns of the weight to right_ [word][2][kStep], and sum e0 e1 + e2 e3 of each.
  // Their rows are short pieces of memory, which no CPU foresees: fetch the next ones.
  [[gnu::noinline]] void widen_weight(const Int8x4* from, int64_t depth, const Int8x4* next) {
    Int16x2* to = right_;
    U32 corrections[kN] = {};
    for (int64_t k = 0; k < depth; ++k, from += kMicroPanel, to += 2 * kStep) {
      for (int64_t j = 0; j < kStep; j += 16) __builtin_prefetch(next + k * kMicroPanel + j, 0, 2);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        const U32 elements = load_bits<U32>(from + n * kLanes) ^ 0x80808080;
        const I16 even = I16(elements) << 8 >> 8, odd = I16(elements) >> 8;
        std::memcpy(to + n * kLanes, &even, sizeof even);
        std::memcpy(to + kStep + n * kLanes, &odd, sizeof odd);
        corrections[n] = multiply_add<Int16x2>(U32(even), U32(odd), corrections[n]);
      }
    }
    std::memcpy(column_corrections_, corrections, sizeof corrections);
  }

  // Add words [k, k + depth) of the product to sums_, for all rows and kStep columns.
  [[gnu::noinline]] void multiply(int64_t k, int64_t depth, int64_t column) {
    int64_t row = 0;
    const auto run = [&](auto count) {
      constexpr int kM = decltype(count)::value;
      for (; row + kM <= rows_; row += kM)
        k ? block<kM, false>(row, k, depth, column) : block<kM, true>(row, k, depth, column);
    };
    run(std::integral_constant<int, kBlock>{});
    run(std::integral_constant<int, 2>{});
    run(std::integral_constant<int, 1>{});
  }

  template <int kM, bool kFirst>
  [[gnu::always_inline]] void block(int64_t row, int64_t k, int64_t depth, int64_t column) {
    const int64_t step = 2 * depth_;
    const Int16x2 *left = left_ + row * step + 2 * k, *right = right_;
    const Int16x2* const end = right + depth * 2 * kStep;
    U32 acc[kM][kN] = {};
#pragma GCC unroll 2
    for (; right != end; left += 2, right += 2 * kStep) {
      I16 even[kN], odd[kN];
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        even[n] = load_bits<I16>(right + n * kLanes);
        odd[n] = load_bits<I16>(right + kStep + n * kLanes);
      }
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) {
        const I16 left_even = I16(U32{} + load_bits<uint32_t>(left + m * step)),
                  left_odd = I16(U32{} + load_bits<uint32_t>(left + m * step + 1));
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n)
          acc[m][n] =
              multiply_add<Int16x2>(U32(left_even + odd[n]), U32(left_odd + even[n]), acc[m][n]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        int32_t* to = sums_ + (row + m) * kMicroPanel + column + n * kLanes;
        const U32 before =
            kFirst ? U32{} - uint32_t(row_corrections_[row + m]) : load_bits<U32>(to);
        const U32 sum = before + acc[m][n] - load_bits<U32>(column_corrections_ + n * kLanes);
        std::memcpy(to, &sum, sizeof sum);
      }
  }

  // Return the bytes 0 2 1 3, 4 6 5 7, ...
  static I8 swap_middle(I8 v) {
    return permuted(v, std::make_index_sequence<2 * kLanes>{},
                    [](int i) { return i % 4 % 3 ? i ^ 3 : i; });
  }
  // Return the lanes 1 0, 3 2, ...
  static U32 swap_pairs(U32 v) {
    return permuted(v, std::make_index_sequence<kLanes>{}, [](int i) { return i ^ 1; });
  }
  template <class V, class From, size_t... kLane>
  static V permuted(V v, std::index_sequence<kLane...>, From) {
    return __builtin_shufflevector(v, v, From{}(int(kLane))...);
  }

  const int64_t inner_, depth_;  // depth_ counts words of VNNI layout.
  Int16x2 *left_, *right_;
  int32_t *row_corrections_, *column_corrections_;
  int32_t* sums_;  // [kRows][kMicroPanel]
  int64_t first_ = 0, rows_ = 0;
};

#endif

}  // namespace
}  // namespace llmos
