// Helpers that the host code of every CPU op uses: typed pointers, dtype dispatch, dropout
// parameters, scratch memory, and the parallel loop over tasks.
#pragma once

#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "../../tensor_view.h"
#include "../dropout.h"
#include "../isa_table.h"
#include "../task_kernel.h"

namespace llmos {

// Return the dropout parameters. seed [2] is int64: the Philox seed and offset.
inline Dropout dropout_of(double p, const Optional& seed) {
  if (p == 0 || !seed) return {};
  check_seed(*seed);
  const int64_t* value = data<int64_t>(*seed);
  Dropout dropout{
      .offset = uint64_t(value[1]), .threshold = uint32_t(p * 0x1p32), .scale = float(1 / (1 - p))};
  const uint32_t key[] = {uint32_t(value[0]), uint32_t(uint64_t(value[0]) >> 32)};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    dropout.keys[round][0] = key[0] + round * 0x9E3779B9;
    dropout.keys[round][1] = key[1] + round * 0xBB67AE85;
  }
  return dropout;
}

// Call body(T{}) with the element type of dtype.
template <class Body>
void for_dtype(ScalarType dtype, Body body) {
  for_dtype_of<bf16, f16>(dtype, body);
}

using Floats = std::unique_ptr<float[]>;

inline Floats floats(int64_t n) { return std::make_unique_for_overwrite<float[]>(n); }

// An uninitialised float buffer, aligned to a cache line.
struct AlignedFloats {
  static constexpr auto kAlignment = std::align_val_t(64);
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kAlignment); }
  };
  std::unique_ptr<float, Free> data;

  explicit AlignedFloats(int64_t n)
      : data(static_cast<float*>(::operator new[](n * sizeof(float), kAlignment))) {}
};

// Run the tasks on torch's threads, each thread with a scratch buffer of its own. `work` is the
// number of multiply-accumulates.
template <class Args>
void run_in_parallel(const TaskKernel<Args>& kernel, const Args& args,
                     const std::vector<typename Args::Task>& tasks, double work) {
  const auto run = [&](int64_t begin, int64_t end) {
    const AlignedFloats scratch(kernel.scratch(args));
    kernel.run(args, tasks.data() + begin, end - begin, scratch.data.get());
  };
  constexpr double kGrain = 1 << 19;  // Below this, starting threads costs more time than it saves.
  const int64_t count = int64_t(tasks.size());
  if (work <= kGrain) {
    if (count) run(0, count);
    return;
  }
  torch::stable::parallel_for(0, count, 1, run);
}

}  // namespace llmos
