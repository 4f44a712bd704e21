// Helpers that the host code of every CUDA op uses: the device and the stream of a call, dtypes.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "../tensor_view.h"
#include "philox.h"

#if defined(__CUDACC__)
#include <torch/csrc/stable/accelerator.h>
#endif

// Ops register themselves for CUDA; in the emulation, as `llmos_emulated` for the CPU.
#if defined(__CUDACC__)
#define LLMOS_NAMESPACE "llmos"
#define LLMOS_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(llmos, CUDA, m)
#else
#define LLMOS_NAMESPACE "llmos_emulated"
#define LLMOS_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(llmos_emulated, CPU, m)
#endif

namespace llmos {

// Return the architecture of the GPU of a tensor, such as 90; -1 if this library was not compiled
// for it.
#if defined(__CUDACC__)
int arch_of(AtenTensorHandle tensor);
#else
inline int arch_of(AtenTensorHandle) { return 90; }
#endif

}  // namespace llmos

// Of torch 2.13 and later; weak, since the rest here works with torch 2.10.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace llmos {

// Raise an error with the text of the one that a call of another op has raised, if it has. The
// stable ABI does not tell its class.
inline void check_call(AOTITorchError error, const char* op) {
  if (error == 0) return;
  const bool is_known = torch_exception_get_what_without_backtrace != nullptr;
  STD_TORCH_CHECK(false, op, ": ",
                  is_known ? torch_exception_get_what_without_backtrace()
                           : "an error whose text this torch does not pass on");
}

// Makes the device of a tensor the current one, and launches kernels on its current stream.
class Device {
 public:
#if defined(__CUDACC__)
  explicit Device(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = cudaStream_t(stream);
  }

  template <class Args>
  void launch(void (*kernel)(Args), dim3 grid, dim3 block, const Args& args) const {
    kernel<<<grid, block, 0, stream_>>>(args);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "llmos: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#else
  explicit Device(const Tensor&) {}

  template <class Args>
  void launch(void (*kernel)(Args), dim3 grid, dim3 block, const Args& args) const {
    simt::run(grid, block, [&] { kernel(args); });
  }
#endif
};

// Call body(T{}) with the element type of dtype.
template <class Body>
void for_dtype(ScalarType dtype, Body body) {
  for_dtype_of<bf16, f16>(dtype, body);
}

// Return the dropout parameters. seed [2] is int64: the Philox seed and offset.
inline Dropout dropout_of(double p, const Optional& seed) {
  if (p == 0 || !seed) return {};
  check_seed(*seed);
  return {data<int64_t>(*seed), uint32_t(p * 0x1p32), float(1 / (1 - p))};
}

// Return true if rows that start at these pointers, null or not, with these strides in bytes, can
// be read and written 16 bytes at a time.
inline bool is_aligned(std::initializer_list<const void*> pointers,
                       std::initializer_list<int64_t> strides) {
  const auto is_even = [](auto v) { return uint64_t(v) % kWidest == 0; };
  return std::all_of(pointers.begin(), pointers.end(),
                     [&](const void* p) { return is_even(uintptr_t(p)); }) &&
         std::all_of(strides.begin(), strides.end(), is_even);
}

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How threads share rows: a warp takes a row of few elements, and a block has some of these; a
// block takes a row of many.
struct RowGrid {
  dim3 grid, block;

  // Each thread takes `each` elements, unless there would be too many threads.
  RowGrid(int64_t rows, int64_t d, int64_t each) {
    const int64_t warps = std::clamp<int64_t>(divided_up(d, each * kWarp), 1, kMaxThreads / kWarp);
    block = dim3(unsigned(warps * kWarp), warps == 1 ? 4 : 1);
    grid = dim3(unsigned(divided_up(rows, block.y)));
  }
};

}  // namespace llmos
