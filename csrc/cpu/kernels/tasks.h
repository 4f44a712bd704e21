// Scratch memory of a task, and how a kernel that does tasks enters its table.
#pragma once

#include "../tasks.h"
#include "vec.h"

namespace llmos {
namespace {

// Hands out pieces of scratch, each aligned to a vector.
struct Scratch {
  float* at;
  template <class T = float>
  T* take(int64_t n) {
    T* taken = reinterpret_cast<T*>(at);
    at += size<T>(n);
    return taken;
  }
  template <class T = float>
  static int64_t size(int64_t n) {
    return (n * int64_t(sizeof(T)) + 63) / 64 * 16;
  }
};

template <class Impl, class Args>
void run_tasks(const Args& args, const typename Args::Task* tasks, int64_t count, float* scratch) {
  Impl impl(args, {scratch});
  for (int64_t i = 0; i < count; ++i) impl.run(tasks[i]);
}

// Enters Impl<T>, which has kBlock, scratch(args) and run(task), as the kernel of Args<T> for every
// type.
template <template <class> class Impl, template <class> class Args>
struct KernelBuilds {
  template <class T>
  struct Of {
    using Kernel = TaskKernel<Args<T>>;
    static constexpr Kernel kKernel{Impl<T>::kBlock, &Impl<T>::scratch,
                                    &run_tasks<Impl<T>, Args<T>>};
    Build<const Kernel*> build{LLMOS_CPU_LEVEL, task_kernel<Args<T>>, &kKernel};
  };
  Of<float> f32;
  Of<bf16> b16;
  Of<f16> f16_;
};

}  // namespace
}  // namespace llmos
