// How products are cut into tasks.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"
#include "../linear.h"

namespace llmos {

// Columns that a task of this kernel should have at the most. A deep panel of many, with its sums,
// would not stay in the second cache: then `strips`.
template <class Args>
int64_t columns_of(const TaskKernel<Args>& kernel, int64_t depth, int64_t strips = 2) {
  constexpr int64_t kDeep = 1536;
  return depth <= kDeep ? kernel.panel : std::min(kernel.panel, strips * kernel.block);
}

// Panels of one or two strips of `columns`, or as wide as `most`, against blocks of `rows`, enough
// for all threads; a block has a multiple of `grain` rows. There is one panel at least.
inline std::vector<ProductTask> tasks_of(int64_t columns, int64_t strip, int64_t rows,
                                         int64_t grain, int64_t most) {
  std::vector<ProductTask> tasks;
  const int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  const int64_t strips = std::max<int64_t>((columns + strip - 1) / strip, 1);
  int64_t panel = strips < wanted ? strip : 2 * strip;
  // Where there are rows enough, wide panels do not leave a thread idle.
  const int64_t blocks = std::max<int64_t>(rows / (2 * grain), 1);
  for (int64_t n = panel / strip + 1; n * strip <= most; ++n)
    if (strips % n == 0 && strips / n * blocks >= wanted) panel = n * strip;
  const int64_t panels = std::max<int64_t>((columns + panel - 1) / panel, 1);
  const int64_t pieces = std::clamp<int64_t>((wanted + panels - 1) / panels, 1, blocks);
  const int64_t piece = ((rows + pieces - 1) / pieces + grain - 1) / grain * grain;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t begin = 0; begin < rows; begin += piece)
      tasks.push_back(
          {p * panel, std::min(panel, columns - p * panel), begin, std::min(begin + piece, rows)});
  return tasks;
}

inline std::vector<ProductTask> ranges(int64_t n, int64_t block) {
  std::vector<ProductTask> tasks;
  for (int64_t begin = 0; begin < n; begin += block)
    tasks.push_back({0, 0, begin, std::min(begin + block, n)});
  return tasks;
}

}  // namespace llmos
