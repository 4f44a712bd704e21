// PanelGemm: GEMMs of whole matrices, c[i][j] = sum over k of left[i][k] right[k][j].
//
// The columns of c are divided into panels, and a panel into micro-panels of a few vectors. A task
// is a panel and a range of rows. A panel of the right operand is packed to VNNI layout, one
// micro-panel after the other and kDepth words deep at a time. The left operand is read in place if
// its rows are in that layout already, else it is packed in small blocks.
#pragma once

#include "../linear.h"
#include "microkernel.h"
#include "register_kernel.h"

namespace llmos {
namespace {

constexpr int64_t kMicroPanel = 4 * kLanes;  // Columns of c in a micro-panel.
// Words of depth that are packed at a time.
constexpr int64_t kDepth = 768;
constexpr int64_t kBlockDepth = 128;

template <class T>
class PanelGemm {
 public:
  using U = WordOf<T>;
  // The left operand is read, and if need be packed, once for each panel: narrow ones would be
  // limited by that, and the sums of wide ones would not fit in the L2 cache. AMX is the fastest.
  static constexpr int64_t kPanel = kUsesAmx<U> ? 6 * kMicroPanel : 192;
  static_assert(kPanel % kMicroPanel == 0);

  explicit PanelGemm(Scratch& scratch)
      : packed_(scratch.take<U>(kDepth * kPanel)),
        left_(scratch.take<U>(kBlockRows * kBlockDepth)),
        transposed_(scratch.take<U>(kUsesAmx<U> * kBlockRows * kBlockDepth)),
        row_buffer_(scratch.take<U>(kLanes * kDepth)),
        sums_(scratch.take(kChunkRows * kPanel)) {}

  static int64_t scratch() {
    return Scratch::size<U>(kDepth * kPanel) +
           (1 + kUsesAmx<U>)*Scratch::size<U>(kBlockRows * kBlockDepth) +
           Scratch::size<U>(kLanes * kDepth) + Scratch::size(kChunkRows * kPanel);
  }

  // The words of a right operand that is packed as a whole.
  static int64_t packed_words(int64_t depth, int64_t columns) {
    return words<U>(depth) * ((columns + kMicroPanel - 1) / kMicroPanel * kMicroPanel);
  }

  // Pack the micro-panel of the right operand whose first column is `first` to its place in
  // `packed`, which holds the whole operand.
  void pack_whole(const Matrix<T>& right, int64_t depth, int64_t first, int64_t columns,
                  U* packed) {
    packed += first * words<U>(depth);
    if (columns < kMicroPanel)  // Some are not written.
      std::memset(packed, 0, packed_words(depth, kMicroPanel) * sizeof(U));
    constexpr int64_t kStep = kDepth * kPerWord<U>;
    for (int64_t k = 0; k < depth; k += kStep, packed += kDepth * kMicroPanel)
      pack_micro_panel(right, k, std::min(k + kStep, depth), first, columns, packed);
  }

  // Compute the rows of c that the task names, for its columns, at most kPanel. Calls finish(row,
  // rows, first, columns, c) for each block of rows and each micro-panel, with c
  // [rows][kMicroPanel]. `whole` is the right operand as pack_whole() packs it, or null.
  template <class Finish>
  void multiply(const Matrix<T>& left, const Matrix<T>& right, int64_t depth, const GemmTask& task,
                Finish finish, const U* whole = nullptr) {
    const bool in_one_part = depth <= kDepth * kPerWord<U>;
    for (int64_t chunk = task.begin; chunk < task.end; chunk += kChunkRows) {
      const int64_t stop = std::min(chunk + kChunkRows, task.end);
      if (depth == 0) std::memset(sums_, 0, kChunkRows * kPanel * sizeof(float));
      int64_t part = 0;
      do {
        const int64_t part_end = std::min(part + kDepth * kPerWord<U>, depth);
        if (whole)
          read_in_place(whole, part, depth, task.first_column);
        else
          pack_right(right, part, part_end, task.first_column, task.columns);
        for (int64_t row = chunk; row < stop; row += kBlockRows) {
          const int64_t rows = std::min(kBlockRows, stop - row);
          float* c = sums_ + (in_one_part ? 0 : (row - chunk) * kMicroPanel);
          constexpr int64_t kStep = kBlockDepth * kPerWord<U>;
          for (int64_t k = part; k < part_end; k += kStep) {
            const bool last = k + kStep >= part_end;
            next_ = whole ? following(right_ + (k - part) / kPerWord<U> * kMicroPanel, rows)
                    : task.columns > kMicroPanel
                        ? NextRows{}
                        : next_rows(left, last ? row + kBlockRows : row, last ? part : k + kStep);
            multiply_block(left, row, rows, k, std::min(k + kStep, part_end), task.columns,
                           right_ + (k - part) / kPerWord<U> * kMicroPanel, k == 0, c);
          }
          for (int64_t j = 0; part_end == depth && j < task.columns; j += kMicroPanel)
            finish(row, rows, task.first_column + j, std::min(kMicroPanel, task.columns - j),
                   c + j * kChunkRows);
        }
        part = part_end;
      } while (part < depth);
    }
  }

 private:
  // Pack rows [k, k_end) of the right operand to packed_ [micro-panel][word][column], unless it
  // holds them already.
  void pack_right(const Matrix<T>& right, int64_t k, int64_t k_end, int64_t first,
                  int64_t columns) {
    if (right.data == data_ && k == k_ && first == first_) return;
    data_ = right.data;
    k_ = k;
    first_ = first;
    right_ = packed_;
    depth_ = words<U>(k_end - k);
    U* to = packed_;
    for (int64_t j = 0; j < columns; j += kMicroPanel, to += depth_ * kMicroPanel)
      pack_micro_panel(right, k, k_end, first + j, std::min(kMicroPanel, columns - j), to);
  }

  // Read the right operand from row k on from a copy that is packed as a whole.
  void read_in_place(const U* whole, int64_t k, int64_t depth, int64_t first) {
    depth_ = words<U>(depth);
    right_ = whole + first * depth_ + k / kPerWord<U> * kMicroPanel;
  }

  void pack_micro_panel(const Matrix<T>& right, int64_t k, int64_t k_end, int64_t first,
                        int64_t columns, U* to) {
    if (right.column_stride == 1)
      pack_by_rows(right, k, k_end, first, columns, to, kMicroPanel);
    else
      pack_by_columns(right, k, k_end, first, columns, to);
  }

  // Pack elements [k, k_end) x [first, first + n) to [word][column], from a matrix with contiguous
  // rows.
  [[gnu::noinline]] static void pack_by_rows(const Matrix<T>& from, int64_t k, int64_t k_end,
                                             int64_t first, int64_t n, U* to, int64_t step) {
    static const T zeros[std::max(kMicroPanel, kBlockRows)] = {};
    const int64_t padded = to_vectors(n);
    for (; k < k_end; k += 2) {
      const T *a = from.at(k, first), *b = k + 1 < k_end ? from.at(k + 1, first) : zeros;
      if (kPerWord<U> == 1 && k + 1 == k_end)
        pack_row(a, n, padded, to);
      else
        pack_row_pair(a, b, n, padded, to, step);
      to += 2 / kPerWord<U> * step;
    }
  }

  // The same from a matrix with contiguous columns.
  [[gnu::noinline]] void pack_by_columns(const Matrix<T>& right, int64_t k, int64_t k_end,
                                         int64_t first, int64_t columns, U* to) {
    const int64_t n = words<U>(k_end - k);
    const bool is_packed = std::is_same_v<Element<U>, T> && (k_end - k) % kPerWord<U> == 0;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const U* lines[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* line = right.at(k, first + j + i);
        lines[i] = row_buffer_ + i * n;
        if (j + i >= columns)
          std::memset(row_buffer_ + i * n, 0, n * sizeof(U));
        else if (is_packed)
          lines[i] = reinterpret_cast<const U*>(line);
        else
          pack_row(line, k_end - k, n * kPerWord<U>, row_buffer_ + i * n);
      }
      transpose_rows(lines, n, to + j, kMicroPanel);
    }
  }

  // Return rows of the left operand from `row` on, and from element k on. Few columns of c take
  // less time than reading these does, and the rows of a block are too short for the CPU to foresee
  // the next. They may lie behind the matrix: fetching does not fault.
  static NextRows next_rows(const Matrix<T>& left, int64_t row, int64_t k) {
    if (left.column_stride != 1) return {};
    constexpr int64_t kBytes = kBlockDepth * kPerWord<U> * sizeof(T);
    return {reinterpret_cast<const char*>(left.at(row, k)), left.row_stride * int64_t(sizeof(T)),
            kBytes};
  }

  // Return the block that follows one of a micro-panel in memory, divided among the rows of the
  // left operand. With many of them there is more to compute than to read.
  static NextRows following(const U* block, int64_t rows) {
    constexpr int64_t kFew = 48, kWords = kBlockDepth * kMicroPanel, kLine = 64;
    if (rows > kFew || kMicroVectors * kLanes == kMicroPanel) return {};
    const int64_t bytes = (kWords * sizeof(U) / rows + kLine - 1) / kLine * kLine;
    return {reinterpret_cast<const char*>(block + kWords), bytes, bytes};
  }

  [[gnu::noinline]] void multiply_block(const Matrix<T>& left, int64_t row, int64_t rows, int64_t k,
                                        int64_t k_end, int64_t columns, const U* right,
                                        bool starts_sum, float* c) {
    const int64_t n = words<U>(k_end - k);
    if (left.column_stride != 1) {
      // The transposed left operand has contiguous rows: pack it as [word][row].
      pack_by_rows({left.data, left.column_stride, left.row_stride}, k, k_end, row, rows, left_,
                   kBlockRows);
      if (!kUsesAmx<U>)
        return multiply<true>(rows, columns, n, left_, kBlockRows, right, starts_sum, c);
      transpose_words(rows, n, left_, kBlockRows, transposed_, kBlockDepth);
      return multiply<false>(rows, columns, n, transposed_, kBlockDepth, right, starts_sum, c);
    }
    // Rows are read as words where both the row stride and the depth are whole numbers of words.
    if (std::is_same_v<Element<U>, T> && ((k_end - k) | left.row_stride) % kPerWord<U> == 0)
      return multiply<false>(rows, columns, n, reinterpret_cast<const U*>(left.at(row, k)),
                             left.row_stride / kPerWord<U>, right, starts_sum, c);
    for (int64_t i = 0; i < rows; ++i)
      pack_row(left.at(row + i, k), k_end - k, n * kPerWord<U>, left_ + i * kBlockDepth);
    multiply<false>(rows, columns, n, left_, kBlockDepth, right, starts_sum, c);
  }

  template <bool kByColumn>
  void multiply(int64_t rows, int64_t columns, int64_t n, const U* left, int64_t step,
                const U* right, bool starts_sum, float* c) {
    const auto run = starts_sum ? &small_gemm<U, kByColumn, Update::Replace>
                                : &small_gemm<U, kByColumn, Update::Add>;
    for (int64_t j = 0; j < columns; j += kMicroPanel, right += depth_ * kMicroPanel)
      run(rows, to_vectors(std::min(kMicroPanel, columns - j)) / kLanes, n, left, step, right,
          kMicroPanel, c + j * kChunkRows, kMicroPanel, nullptr, next_);
  }

  U *packed_, *left_, *transposed_, *row_buffer_;
  // [micro-panel][row of the chunk][column]. If the depth fits one part, every block of rows is
  // finished at once and uses the first rows.
  float* sums_;
  // packed_ holds this matrix from row k_ and column first_ on.
  const T* data_ = nullptr;
  int64_t k_ = 0, first_ = 0;
  // The right operand as it is read, [micro-panel][depth_][kMicroPanel].
  const U* right_ = nullptr;
  int64_t depth_ = 0;
  NextRows next_;  // What is multiplied after the block at hand.
};

}  // namespace
}  // namespace llmos
