// Products of whole matrices: c[i][j] = sum over k of left[i][k] right[k][j].
//
// The columns of c are cut into panels, these into strips of a few vectors. A panel of the right
// operand is packed strip by strip, kDepth units of it at a time; the left operand is read where it
// lies if its rows are units already, else packed by small blocks.
#pragma once

#include "../linear.h"
#include "register_kernel.h"
#include "microkernel.h"

namespace llmos {
namespace {

constexpr int64_t kStrip = 4 * kLanes;  // Columns of c.
constexpr int64_t kDepth = 768;         // Units of a packed panel: it stays in the second cache.
constexpr int64_t kBlockDepth = 128;

template <class T>
class Panels {
 public:
  using U = UnitOf<T>;
  // Tiles are so fast that reading the left operand for each narrow panel would hold them up.
  static constexpr int64_t kPanel = (kInTiles<U> ? 6 : 2) * kStrip;

  explicit Panels(Scratch& scratch)
      : packed_(scratch.take<U>(kDepth * kPanel)),
        block_(scratch.take<U>(kBlockRows * kBlockDepth)),
        turned_(scratch.take<U>(kInTiles<U> * kBlockRows * kBlockDepth)),
        lines_(scratch.take<U>(kLanes * kDepth)),
        sums_(scratch.take(kChunkRows * kPanel)) {}

  static int64_t scratch() {
    return Scratch::size<U>(kDepth * kPanel) +
           (1 + kInTiles<U>)*Scratch::size<U>(kBlockRows * kBlockDepth) +
           Scratch::size<U>(kLanes * kDepth) + Scratch::size(kChunkRows * kPanel);
  }

  // The rows of c that the task names, in its columns, at most kPanel. Calls
  // finish(row, rows, first, columns, c) for each block of rows in each strip, c [rows][kStrip].
  template <class Finish>
  void multiply(const Matrix<T>& left, const Matrix<T>& right, int64_t depth,
                const ProductTask& task, Finish finish) {
    const bool in_one_part = depth <= kDepth * kPerUnit<U>;
    for (int64_t chunk = task.begin; chunk < task.end; chunk += kChunkRows) {
      const int64_t stop = std::min(chunk + kChunkRows, task.end);
      if (depth == 0) std::memset(sums_, 0, kChunkRows * kPanel * sizeof(float));
      int64_t part = 0;
      do {
        const int64_t part_end = std::min(part + kDepth * kPerUnit<U>, depth);
        pack_right(right, part, part_end, task.first, task.columns);
        for (int64_t row = chunk; row < stop; row += kBlockRows) {
          const int64_t rows = std::min(kBlockRows, stop - row);
          float* c = sums_ + (in_one_part ? 0 : (row - chunk) * kStrip);
          constexpr int64_t kStep = kBlockDepth * kPerUnit<U>;
          for (int64_t k = part; k < part_end; k += kStep)
            block(left, row, rows, k, std::min(k + kStep, part_end), task.columns,
                  packed_ + (k - part) / kPerUnit<U> * kStrip, k == 0, c);
          for (int64_t j = 0; part_end == depth && j < task.columns; j += kStrip)
            finish(row, rows, task.first + j, std::min(kStrip, task.columns - j),
                   c + j * kChunkRows);
        }
        part = part_end;
      } while (part < depth);
    }
  }

 private:
  // packed_[strip][unit][column] of rows [k, k_end) of the right operand.
  void pack_right(const Matrix<T>& right, int64_t k, int64_t k_end, int64_t first,
                  int64_t columns) {
    if (right.data == data_ && k == k_ && first == first_) return;
    data_ = right.data;
    k_ = k;
    first_ = first;
    U* to = packed_;
    for (int64_t j = 0; j < columns; j += kStrip, to += kDepth * kStrip) {
      const int64_t n = std::min(kStrip, columns - j);
      if (right.column == 1)
        pack_by_rows(right, k, k_end, first + j, n, to, kStrip);
      else
        turn(right, k, k_end, first + j, n, to);
    }
  }

  // to[unit][j] of elements [k, k_end) x [first, first + n), rows of which lie in one piece.
  [[gnu::noinline]] static void pack_by_rows(const Matrix<T>& from, int64_t k, int64_t k_end,
                                             int64_t first, int64_t n, U* to, int64_t step) {
    static const T zeros[std::max(kStrip, kBlockRows)] = {};
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
                              int64_t columns, U* to) {
    const int64_t n = units<U>(k_end - k);
    const bool in_units = std::is_same_v<Element<U>, T> && (k_end - k) % kPerUnit<U> == 0;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const U* lines[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* line = right.at(k, first + j + i);
        lines[i] = lines_ + i * n;
        if (j + i >= columns)
          std::memset(lines_ + i * n, 0, n * sizeof(U));
        else if (in_units)
          lines[i] = reinterpret_cast<const U*>(line);
        else
          pack_row(line, k_end - k, n * kPerUnit<U>, lines_ + i * n);
      }
      transpose_rows(lines, n, to + j, kStrip);
    }
  }

  [[gnu::noinline]] void block(const Matrix<T>& left, int64_t row, int64_t rows, int64_t k,
                               int64_t k_end, int64_t columns, const U* right, bool begins,
                               float* c) {
    const int64_t n = units<U>(k_end - k);
    if (left.column != 1) {
      pack_by_rows({left.data, left.column, left.row}, k, k_end, row, rows, block_, kBlockRows);
      if (!kInTiles<U>)
        return multiply<true>(rows, columns, n, block_, kBlockRows, right, begins, c);
      turn_by_columns(rows, n, block_, kBlockRows, turned_, kBlockDepth);
      return multiply<false>(rows, columns, n, turned_, kBlockDepth, right, begins, c);
    }
    // The last unit of an odd row is half another's.
    if (std::is_same_v<Element<U>, T> && ((k_end - k) | left.row) % kPerUnit<U> == 0)
      return multiply<false>(rows, columns, n, reinterpret_cast<const U*>(left.at(row, k)),
                             left.row / kPerUnit<U>, right, begins, c);
    for (int64_t i = 0; i < rows; ++i)
      pack_row(left.at(row + i, k), k_end - k, n * kPerUnit<U>, block_ + i * kBlockDepth);
    multiply<false>(rows, columns, n, block_, kBlockDepth, right, begins, c);
  }

  template <bool kByColumn>
  static void multiply(int64_t rows, int64_t columns, int64_t n, const U* left, int64_t step,
                       const U* right, bool begins, float* c) {
    const auto run =
        begins ? &product<U, kByColumn, Into::Replace> : &product<U, kByColumn, Into::Add>;
    for (int64_t j = 0; j < columns; j += kStrip, right += kDepth * kStrip)
      run(rows, to_vectors(std::min(kStrip, columns - j)) / kLanes, n, left, step, right, kStrip,
          c + j * kChunkRows, kStrip, nullptr);
  }

  U *packed_, *block_, *turned_, *lines_;
  float* sums_;
  const T* data_ = nullptr;  // What packed_ holds.
  int64_t k_ = 0, first_ = 0;
};

}  // namespace
}  // namespace llmos
