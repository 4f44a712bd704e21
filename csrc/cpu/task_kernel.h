// Work that is cut into tasks: what a CPU level's kernel is told of it.
#pragma once

#include <cstdint>

#include "isa_table.h"

namespace llmos {

// How one CPU level does the tasks of Args. Scratch is floats, aligned to 64 bytes.
template <class Args>
struct TaskKernel {
  int64_t block;  // Rows or columns in a task's block.
  int64_t panel;  // Columns that a task may have at the most, where its blocks are columns.
  int64_t (*scratch)(const Args&);
  void (*run)(const Args&, const typename Args::Task*, int64_t tasks, float* scratch);
};

template <class Args>
inline Dispatch<const TaskKernel<Args>*> task_kernel;

}  // namespace llmos
