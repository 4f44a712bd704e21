// Products of whole matrices: c[i][j] = sum over k of left[i][k] right[k][j].
//
// The columns of c are cut into panels of a few vectors. A panel of the right operand is packed,
// kDepth units of it at a time; the left operand is read where it lies if its rows are units
// already, else packed by small blocks that stay in the first cache.
#pragma once

#include "../linear.h"
#include "tasks.h"
#include "tiles.h"

namespace llmos {
namespace {

constexpr int64_t kPanel = 4 * kLanes;  // Columns of c.
constexpr int64_t kDepth = 1024;        // Units of a packed panel: it stays in the second cache.
constexpr int64_t kBlockRows = 48, kBlockDepth = 128;
static_assert(kChunkRows % kBlockRows == 0);

template <class T>
class Panels {
 public:
  using U = UnitOf<T>;

  explicit Panels(Scratch& scratch)
      : packed_(scratch.take<U>(kDepth * kPanel)),
        block_(scratch.take<U>(kBlockRows * kBlockDepth)),
        lines_(scratch.take<U>(kLanes * kDepth)),
        sums_(scratch.take(kChunkRows * kPanel)) {}

  static int64_t scratch() {
    return Scratch::size<U>(kDepth * kPanel) + Scratch::size<U>(kBlockRows * kBlockDepth) +
           Scratch::size<U>(kLanes * kDepth) + Scratch::size(kChunkRows * kPanel);
  }

  // Rows [begin, end) of c in the panel that starts at column `first` and has `columns`. Calls
  // finish(row, rows, c) for each block of rows, c [rows][kPanel].
  template <class Finish>
  void multiply(const Matrix<T>& left, const Matrix<T>& right, int64_t depth, int64_t begin,
                int64_t end, int64_t first, int64_t columns, Finish finish) {
    const int64_t vectors = to_vectors(columns) / kLanes;
    for (int64_t chunk = begin; chunk < end; chunk += kChunkRows) {
      const int64_t stop = std::min(chunk + kChunkRows, end);
      if (depth == 0) std::memset(sums_, 0, kChunkRows * kPanel * sizeof(float));
      int64_t part = 0;
      do {
        const int64_t part_end = std::min(part + kDepth * kPerUnit<U>, depth);
        pack_right(right, part, part_end, first, columns);
        for (int64_t row = chunk; row < stop; row += kBlockRows) {
          const int64_t rows = std::min(kBlockRows, stop - row);
          float* c = sums_ + (row - chunk) * kPanel;
          constexpr int64_t kStep = kBlockDepth * kPerUnit<U>;
          for (int64_t k = part; k < part_end; k += kStep)
            block(left, row, rows, k, std::min(k + kStep, part_end), vectors,
                  packed_ + (k - part) / kPerUnit<U> * kPanel, k == 0, c);
          if (part_end == depth) finish(row, rows, c);
        }
        part = part_end;
      } while (part < depth);
    }
  }

 private:
  // packed_[unit][column] of rows [k, k_end) of the right operand.
  void pack_right(const Matrix<T>& right, int64_t k, int64_t k_end, int64_t first,
                  int64_t columns) {
    if (right.data == data_ && k == k_ && first == first_) return;
    data_ = right.data;
    k_ = k;
    first_ = first;
    if (right.column == 1)
      pack_by_rows(right, k, k_end, first, columns, packed_, kPanel);
    else
      turn(right, k, k_end, first, columns);
  }

  // to[unit][j] of elements [k, k_end) x [first, first + n), rows of which lie in one piece.
  [[gnu::noinline]] static void pack_by_rows(const Matrix<T>& from, int64_t k, int64_t k_end,
                                             int64_t first, int64_t n, U* to, int64_t step) {
    static const T zeros[kPanel > kBlockRows ? kPanel : kBlockRows] = {};
    const int64_t padded = to_vectors(n);
    for (; k < k_end; k += 2) {
      const T *a = from.at(k, first), *b = k + 1 < k_end ? from.at(k + 1, first) : zeros;
      if (kPerUnit<U> == 1 && k + 1 == k_end)
        pack_row(a, n, padded, to);
      else
        pack_two_rows(a, b, n, padded, to, step);
      to += 2 / kPerUnit<U> * step;
    }
  }

  // The same where columns lie in one piece.
  [[gnu::noinline]] void turn(const Matrix<T>& right, int64_t k, int64_t k_end, int64_t first,
                              int64_t columns) {
    const int64_t n = units<U>(k_end - k);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const U* lines[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        lines[i] = lines_ + i * n;
        if (j + i < columns)
          pack_row(right.at(k, first + j + i), k_end - k, n * kPerUnit<U>, lines_ + i * n);
        else
          std::memset(lines_ + i * n, 0, n * sizeof(U));
      }
      transpose_rows(lines, n, packed_ + j, kPanel);
    }
  }

  [[gnu::noinline]] void block(const Matrix<T>& left, int64_t row, int64_t rows, int64_t k,
                               int64_t k_end, int64_t vectors, const U* right, bool begins,
                               float* c) {
    const int64_t n = units<U>(k_end - k);
    if (left.column != 1) {
      pack_by_rows({left.data, left.column, left.row}, k, k_end, row, rows, block_, kBlockRows);
      return multiply<true>(rows, vectors, n, block_, kBlockRows, right, begins, c);
    }
    // What comes next: there are too many rows for the hardware to follow.
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t at = 0; at < k_end - k; at += 64 / sizeof(T))
        __builtin_prefetch(left.at(row + i, k_end + at));
    // The last unit of an odd row is half another's.
    if (std::is_same_v<Element<U>, T> && (k_end - k | left.row) % kPerUnit<U> == 0)
      return multiply<false>(rows, vectors, n, reinterpret_cast<const U*>(left.at(row, k)),
                             left.row / kPerUnit<U>, right, begins, c);
    for (int64_t i = 0; i < rows; ++i)
      pack_row(left.at(row + i, k), k_end - k, n * kPerUnit<U>, block_ + i * kBlockDepth);
    multiply<false>(rows, vectors, n, block_, kBlockDepth, right, begins, c);
  }

  template <bool kByColumn>
  static void multiply(int64_t rows, int64_t vectors, int64_t n, const U* left, int64_t step,
                       const U* right, bool begins, float* c) {
    const auto run =
        begins ? &product<U, kByColumn, Into::Replace> : &product<U, kByColumn, Into::Add>;
    run(rows, vectors, n, left, step, right, kPanel, c, kPanel, nullptr);
  }

  U *packed_, *block_, *lines_;
  float* sums_;
  const T* data_ = nullptr;  // What packed_ holds.
  int64_t k_ = 0, first_ = 0;
};

}  // namespace
}  // namespace llmos
