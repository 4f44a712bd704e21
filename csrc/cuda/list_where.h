// Lists the numbers that fulfil a condition, in order, by the threads of a block.
#pragma once

#include "kernel.h"

namespace llmos {

// Call emit(i, n) for the i-th number n in [0, count) for which is(n) is true; return how many
// there are. All threads of a block of whole warps, of one dimension, must call it.
template <class Is, class Emit>
LLMOS_DEVICE int list_where(int64_t count, Is is, Emit emit) {
  __shared__ Shared<int, kWarp> counts;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  int before = 0;
  for (int64_t first = 0; first < count; first += blockDim.x) {
    const int64_t n = first + threadIdx.x;
    const bool is_one = n < count && is(n);
    const unsigned found = __ballot_sync(kAllLanes, is_one);
    if (lane == 0) counts[warp] = __popc(found);
    __syncthreads();
    int at = before;
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
      const int of_warp = counts[w];
      at += w < warp ? of_warp : 0;
      before += of_warp;
    }
    if (is_one) emit(at + __popc(found & ((1u << lane) - 1)), n);
    __syncthreads();  // Before the counts are written again.
  }
  return before;
}

}  // namespace llmos
