// The op built_for: tells which of the compiled GPU architectures runs on a device. It exercises
// all that a CUDA op needs: loading, dispatch, device guard, stream and launch.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../tensor_view.h"

namespace llmos {
namespace {

__global__ void built_for_kernel(int32_t* out) {
#if defined(__CUDA_ARCH__)
  *out = __CUDA_ARCH__ / 10;
#endif
}

// Return [1] int32, as 90 if code for sm_90 ran. like: any tensor on the device.
Tensor built_for(const Tensor& like) {
  Tensor out = output(like, {1}, ScalarType::Int);
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  built_for_kernel<<<1, 1, 0, cudaStream_t(stream)>>>(
      static_cast<int32_t*>(out.mutable_data_ptr()));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "built_for: ", cudaGetErrorString(error));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CUDA, m) { m.impl("built_for", TORCH_BOX(&built_for)); }

}  // namespace llmos
