// The kernel side of tasks: scratch memory, the loop over a range of tasks, and the registration of
// a kernel in its ISA table.
#pragma once

#include "../task_kernel.h"
#include "microkernel_amx.h"

namespace llmos {
namespace {

// Hands out parts of a scratch buffer, each aligned to 64 bytes.
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
void run_task_range(const Args& args, const typename Args::Task* tasks, int64_t count,
                    float* scratch) {
  const AmxScope amx;
  Impl impl(args, {scratch});
  for (int64_t i = 0; i < count; ++i) impl.run(tasks[i]);
}

// Registers Impl, which has kBlock, scratch(args) and run(task), as this ISA's kernel for Args.
template <class Impl, class Args, bool kRegister = true>
struct RegisterTaskKernel {
  static constexpr int64_t panel() {
    if constexpr (requires { Impl::kPanel; })
      return Impl::kPanel;
    else
      return 2 * Impl::kBlock;
  }
  static constexpr TaskKernel<Args> kKernel{Impl::kBlock, panel(), &Impl::scratch,
                                            &run_task_range<Impl, Args>};
  Register<const TaskKernel<Args>*> entry{LLMOS_ISA, task_kernel<Args>, &kKernel};
};
template <class Impl, class Args>
struct RegisterTaskKernel<Impl, Args, false> {};

// Registers Impl for each element type that gains from this ISA (isa_table.h), or, with kAll, for
// all element types. Kernels that mostly work on int8 set kAll.
template <template <class> class Impl, template <class> class Args, bool kAll = false>
struct RegisterForDtypes {
  RegisterTaskKernel<Impl<float>, Args<float>, kAll || kIsaBenefits<float>> f32;
  RegisterTaskKernel<Impl<bf16>, Args<bf16>, kAll || kIsaBenefits<bf16>> b16;
  RegisterTaskKernel<Impl<f16>, Args<f16>, kAll || kIsaBenefits<f16>> f16_;
};

}  // namespace
}  // namespace llmos
