// Which of the GPUs this library was built for answers on the device of a tensor.
// It runs the whole chain that every CUDA op needs: load, dispatch, guard, stream, launch.
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

// like: any tensor on the device. Returns [1] int32: 90 where code for sm_90 ran.
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
