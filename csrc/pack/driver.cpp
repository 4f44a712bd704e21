// Loads the CUDA driver library and looks up its functions.
#include "driver.h"

#include <dlfcn.h>

#include <string>

namespace llmos::pack {
namespace {

Driver open() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw Unusable(std::string("no CUDA driver: ") + dlerror());
  const auto find = [&](auto& to, const char* name, bool needed = true) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(dlsym(library, name));
    if (needed && !to) throw Unusable(std::string("the CUDA driver has no ") + name);
  };
  Driver d{};
  find(d.get_error_string, "cuGetErrorString");
  find(d.get_version, "cuDriverGetVersion");
  find(d.device_get, "cuDeviceGet");
  find(d.primary_context_retain, "cuDevicePrimaryCtxRetain");
  find(d.context_get_current, "cuCtxGetCurrent");
  find(d.context_set_current, "cuCtxSetCurrent");
  find(d.exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
  find(d.pointer_get_attribute, "cuPointerGetAttribute");
  find(d.module_load_data, "cuModuleLoadData");
  find(d.module_get_function, "cuModuleGetFunction");
  find(d.function_set_attribute, "cuFuncSetAttribute");
  find(d.launch_kernel, "cuLaunchKernel");
  find(d.function_get_param_info, "cuFuncGetParamInfo", false);
  find(d.tensor_map_encode_tiled, "cuTensorMapEncodeTiled", false);
  return d;
}

}  // namespace

const Driver& driver() {
  static const Driver opened = open();
  return opened;
}

void check(Result result, const char* what, const char* kernel) {
  if (result == kSuccess) return;
  const char* words = nullptr;
  driver().get_error_string(result, &words);
  throw std::runtime_error(std::string(what) + " failed for " + kernel + ": " +
                           (words ? words : "error " + std::to_string(result)));
}

}  // namespace llmos::pack
