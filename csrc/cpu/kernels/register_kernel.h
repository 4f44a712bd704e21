// Scratch memory of a task, and how a kernel that does tasks enters its table.
#pragma once

#include "../task_kernel.h"
#include "microkernel_amx.h"

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
  const TilesInUse tiles;
  Impl impl(args, {scratch});
  for (int64_t i = 0; i < count; ++i) impl.run(tasks[i]);
}

// Enters Impl, which has kBlock, scratch(args) and run(task), as the kernel of Args.
template <class Impl, class Args, bool kBuilt = true>
struct BuildOf {
  static constexpr int64_t panel() {
    if constexpr (requires { Impl::kPanel; })
      return Impl::kPanel;
    else
      return 2 * Impl::kBlock;
  }
  static constexpr TaskKernel<Args> kKernel{Impl::kBlock, panel(), &Impl::scratch,
                                            &run_tasks<Impl, Args>};
  Build<const TaskKernel<Args>*> build{LLMOS_ISA, task_kernel<Args>, &kKernel};
};
template <class Impl, class Args>
struct BuildOf<Impl, Args, false> {};

// The same for every type of element that the level has instructions for; kAll: for every one.
template <template <class> class Impl, template <class> class Args, bool kAll = false>
struct KernelBuilds {
  BuildOf<Impl<float>, Args<float>, kAll || kGains<float>> f32;
  BuildOf<Impl<bf16>, Args<bf16>, kAll || kGains<bf16>> b16;
  BuildOf<Impl<f16>, Args<f16>, kAll || kGains<f16>> f16_;
};

}  // namespace
}  // namespace llmos
