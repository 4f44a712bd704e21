// llmos_multiply_adds(): multiply-adds on all threads of torch, for benchmarks.
#include "../peak.h"

#include <atomic>

#include "common.h"

namespace llmos {

// Run multiply-adds of a dtype, 0 for float32, 1 for bfloat16, 2 for int8, on `threads` threads,
// and return the number of operations.
extern "C" [[gnu::visibility("default")]] int64_t llmos_multiply_adds(int dtype, int64_t rounds,
                                                                      int64_t threads) {
  const IsaTable<MultiplyAddsFn>* tables[] = {&multiply_adds<float>, &multiply_adds<bf16>,
                                              &multiply_adds<int8_t>};
  const MultiplyAddsFn run = tables[dtype]->best();
  std::atomic<int64_t> operations = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) operations += run(rounds);
  });
  return operations;
}

}  // namespace llmos
