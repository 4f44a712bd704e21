// The CUDA driver API, loaded from libcuda.so.1 on first use, so that _C loads without a driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace llmos::pack {

// Types and constants of the driver API, from its reference: the CUDA headers are not needed.
using Result = int;
using Handle = void*;  // CUcontext, CUmodule, CUfunction, CUstream
constexpr Result kSuccess = 0, kInvalidValue = 1;
constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kDevicePointer = 3;     // CU_POINTER_ATTRIBUTE_DEVICE_POINTER
constexpr int kCaptureRelaxed = 2;    // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr int kL2Promotion128 = 2;    // CU_TENSOR_MAP_L2_PROMOTION_L2_128B
constexpr size_t kTensorMapBytes = 128;

struct Driver {
  Result (*get_error_string)(Result, const char**);
  Result (*get_version)(int*);
  Result (*device_get)(int*, int);
  Result (*primary_context_retain)(Handle*, int);
  Result (*context_get_current)(Handle*);
  Result (*context_set_current)(Handle);
  Result (*exchange_capture_mode)(int*);
  Result (*pointer_get_attribute)(void*, int, uint64_t);
  Result (*module_load_data)(Handle*, const void*);
  Result (*module_get_function)(Handle*, Handle, const char*);
  Result (*function_set_attribute)(Handle, int, int);
  Result (*launch_kernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                          unsigned, Handle, void**, void**);
  // From CUDA 12.4 and 12.0; null in an older driver.
  Result (*function_get_param_info)(Handle, size_t, size_t*, size_t*);
  Result (*tensor_map_encode_tiled)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*,
                                    const uint32_t*, const uint32_t*, int, int, int, int);
};

// The ahead-of-time kernels cannot be used here; Triton may still be able to compile its own.
struct Unusable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Return the driver API. Throws Unusable if there is no driver, or one that lacks a function.
const Driver& driver();

// Throw std::runtime_error with the driver's error message unless the result is kSuccess.
void check(Result result, const char* what, const char* kernel);

}  // namespace llmos::pack
