// TaskKernel: a kernel whose work is split into independent tasks. Host code (host/common.h) makes
// the tasks and runs them on several threads.
#pragma once

#include <cstdint>

#include "isa_table.h"

namespace llmos {

// One ISA's kernel for the work that Args describes. The scratch buffer holds floats and is aligned
// to 64 bytes.
template <class Args>
struct TaskKernel {
  int64_t block;  // Rows or columns of a block; a task consists of whole blocks.
  int64_t panel;  // The largest number of columns of a GEMM task.
  int64_t (*scratch)(const Args&);
  void (*run)(const Args&, const typename Args::Task*, int64_t tasks, float* scratch);
};

template <class Args>
inline IsaTable<const TaskKernel<Args>*> task_kernel;

}  // namespace llmos
