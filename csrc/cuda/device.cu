// Which of the compiled GPU architectures runs on a device, if any.
#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "choice.h"

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
  Device(like).launch(built_for_kernel, dim3(1), dim3(1), mutable_data<int32_t>(out));
  return out;
}

}  // namespace

int arch_of(AtenTensorHandle tensor) {
  constexpr int kUnknown = 0, kNone = -1;
  static std::array<std::atomic<int>, 64> known{};
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &device));
  STD_TORCH_CHECK(device >= 0 && size_t(device) < known.size(), "no such device: ", device);
  std::atomic<int>& answer = known[size_t(device)];
  if (answer != kUnknown) return answer;
  const torch::stable::accelerator::DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  int major = 0, minor = 0;
  if (cudaFuncGetAttributes(&attributes, built_for_kernel) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();  // It must not be the error of the next launch.
    return kNone;        // Not for ever: the reason may be another than that there is no code.
  }
  return answer = 10 * major + minor;
}

STABLE_TORCH_LIBRARY_IMPL(llmos, CUDA, m) { m.impl("built_for", TORCH_BOX(&built_for)); }

}  // namespace llmos
