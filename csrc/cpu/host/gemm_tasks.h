// How a GEMM is split into tasks.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../linear.h"
#include "common.h"

namespace llmos {

// Return the largest number of columns for a task of this kernel. A wide panel (AMX has such) that
// is deep as well is limited to `micro_panels` micro-panels: more of them and their sums would not
// fit in the L2 cache.
template <class Args>
int64_t max_panel_columns(const TaskKernel<Args>& kernel, int64_t depth, int64_t micro_panels = 2) {
  constexpr int64_t kDeep = 1536, kWide = 192;
  const bool fits = depth <= kDeep || kernel.panel <= kWide;
  return fits ? kernel.panel : std::min(kernel.panel, micro_panels * kernel.block);
}

// Return the number of rows of a task, a multiple of `grain`, where each of `panels` panels is
// divided into at least `least` and at most `most` pieces: the number that leaves the longest work
// of a thread shortest.
inline int64_t rows_per_task(int64_t rows, int64_t grain, int64_t panels, int64_t least,
                             int64_t most) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t found = 0, shortest = std::numeric_limits<int64_t>::max();
  for (int64_t pieces = least; pieces <= most; ++pieces) {
    const int64_t blocks = ((rows + pieces - 1) / pieces + grain - 1) / grain;
    const int64_t piece = std::max<int64_t>(blocks, 1) * grain;
    const int64_t tasks = panels * ((rows + piece - 1) / piece);
    const int64_t longest = (tasks + threads - 1) / threads * piece;
    if (longest < shortest) shortest = longest, found = piece;
  }
  return found;
}

// Return tasks for a result of `rows` x `columns`: panels of one or two micro-panels, or of up to
// max_columns columns, times ranges of rows, of which each is a multiple of `grain`. There are
// enough tasks for all threads, and at least one panel.
inline std::vector<GemmTask> gemm_tasks(int64_t columns, int64_t micro_panel, int64_t rows,
                                        int64_t grain, int64_t max_columns) {
  std::vector<GemmTask> tasks;
  const int64_t wanted_tasks = 4 * int64_t(torch::stable::get_num_threads());
  const int64_t micro_panels = std::max<int64_t>((columns + micro_panel - 1) / micro_panel, 1);
  int64_t panel = micro_panels < wanted_tasks ? micro_panel : 2 * micro_panel;
  // With many rows there are enough tasks even if panels are wide.
  const int64_t blocks = std::max<int64_t>(rows / (2 * grain), 1);
  for (int64_t multiple = panel / micro_panel + 1; multiple * micro_panel <= max_columns;
       ++multiple)
    if (micro_panels % multiple == 0 && micro_panels / multiple * blocks >= wanted_tasks)
      panel = multiple * micro_panel;
  const int64_t panels = std::max<int64_t>((columns + panel - 1) / panel, 1);
  const int64_t least = std::clamp<int64_t>((wanted_tasks + panels - 1) / panels, 1, blocks);
  const int64_t piece = rows_per_task(rows, grain, panels, least, std::min(2 * least, blocks));
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t begin = 0; begin < rows; begin += piece)
      tasks.push_back(
          {p * panel, std::min(panel, columns - p * panel), begin, std::min(begin + piece, rows)});
  return tasks;
}

// Return tasks for the ranges of `block` rows or columns that [0, n) consists of.
inline std::vector<GemmTask> range_tasks(int64_t n, int64_t block) {
  std::vector<GemmTask> tasks;
  for (int64_t begin = 0; begin < n; begin += block)
    tasks.push_back({0, 0, begin, std::min(begin + block, n)});
  return tasks;
}

}  // namespace llmos
