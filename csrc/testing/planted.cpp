// Kernels with a fault each, to see that simt.h reports it.
#include <cstring>
#include <stdexcept>

#include "simt.h"

namespace llmos {
namespace {

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffff;

void kernel(const std::string& fault, const float* in, float* out) {
  __shared__ Shared<float, kThreads> values;
  const int i = int(threadIdx.x), next = (i + 1) % kThreads;
  if (fault != "not written") values[i] = in[i];
  if (fault == "two writers") values[0] = 1;
  if (fault == "outside") values[kThreads + i] = 1;
  if (fault == "part of a barrier" && i < 32) __syncthreads();
  if (fault == "another barrier" && i < 32)
    __syncthreads();
  else if (fault != "no barrier")
    __syncthreads();
  float v = values[next];
  if (fault == "write after read") values[i] = 2;
  if (fault == "absent lanes" && i % 32 > 16) return;
  v += __shfl_xor_sync(kAll, v, 1);
  if (fault == "two meetings" && i % 2) v += __shfl_xor_sync(kAll, v, 1);
  if (fault == "two meetings" && i % 2 == 0) v += __shfl_xor_sync(kAll, v, 1);
  if (fault == "over-read" && i == 0) v += simt::load_global<float>(in + kThreads);
  if (fault == "misaligned") v = simt::load_global<double>(in + 1 + 2 * (i / 4)) > 0;
  out[i] = v;
}

}  // namespace
}  // namespace llmos

extern "C" {

// Run the kernel with a fault; write the message of the error to `message`, an empty one if there
// is none.
[[gnu::visibility("default")]] void llmos_simt_plant(const char* fault, char* message, int size) {
  const std::vector<float> in(llmos::kThreads);  // On the heap, where a sanitizer sees over-reads.
  float out[llmos::kThreads];
  message[0] = 0;
  try {
    const std::string name = fault;
    llmos::simt::run(dim3(1), dim3(llmos::kThreads), [&] { llmos::kernel(name, in.data(), out); });
  } catch (const std::runtime_error& e) {
    std::strncpy(message, e.what(), size_t(size) - 1);
    message[size - 1] = 0;
  }
}
}
