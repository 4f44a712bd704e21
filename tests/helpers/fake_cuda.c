// A fake CUDA driver, for tests and for measuring the host time of launches. It accepts every
// cubin, runs nothing, and stores the last launch. Pointers below 1000 count as not on a GPU.
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int CUresult;
enum { kSuccess = 0, kInvalidValue = 1, kInvalidImage = 200, kMost = 96 };

struct Launch {
  unsigned grid[3], threads, shared;
  uint64_t stream;
  unsigned char bytes[kMost][128];
};
// Several threads may launch: a mutex protects the last launch, and the counters are atomic.
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
struct Launch fake_last;
_Atomic int fake_loads, fake_launches;
int fake_shared, fake_broken_images;
// If set, functions that load code fail unless the thread's capture mode is relaxed (2).
int fake_strict;
__thread int fake_capture_mode;
// The parameters that cuFuncGetParamInfo reports, and the bytes that cuLaunchKernel stores of each.
size_t fake_count, fake_sizes[kMost];

static int context;

static CUresult loading(void) { return fake_strict && fake_capture_mode != 2 ? 901 : kSuccess; }

CUresult cuGetErrorString(CUresult error, const char** words) {
  *words = error == kInvalidImage ? "device kernel image is invalid" : "invalid argument";
  return kSuccess;
}
CUresult cuInit(unsigned flags) { return kSuccess; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
CUresult cuDeviceGet(int* device, int ordinal) { return *device = ordinal, kSuccess; }
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  return *value = 1 << 18, kSuccess;
}
CUresult cuDevicePrimaryCtxRetain(void** to, int device) { return *to = &context, kSuccess; }
CUresult cuCtxGetCurrent(void** to) {
  static __thread int calls;  // At first a thread has no context.
  return *to = calls++ ? &context : NULL, kSuccess;
}
CUresult cuCtxSetCurrent(void* to) { return to == &context ? kSuccess : kInvalidValue; }
CUresult cuCtxGetLimit(size_t* value, int limit) { return *value = 0, kSuccess; }
CUresult cuCtxSetLimit(int limit, size_t value) { return kSuccess; }
CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = fake_capture_mode;
  fake_capture_mode = *mode;
  return *mode = before, kSuccess;
}
CUresult cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  *(uint64_t*)data = pointer;
  return pointer < 1000 ? kInvalidValue : kSuccess;
}
CUresult cuPointerGetAttributes(unsigned n, int* attributes, void** data, uint64_t pointer) {
  return kSuccess;
}
CUresult cuModuleLoadData(void** module, const void* image) {
  if (fake_broken_images || memcmp(image, "\177ELF", 4)) return kInvalidImage;
  ++fake_loads;
  return *module = &context, loading();
}
CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
  return *function = &context, loading();
}
CUresult cuFuncGetAttribute(int* value, int attribute, void* function) {
  return *value = 1024, kSuccess;
}
CUresult cuFuncSetAttribute(void* function, int attribute, int value) {
  return fake_shared = value, attribute == 8 ? loading() : kInvalidValue;
}
CUresult cuFuncSetCacheConfig(void* function, int config) { return kSuccess; }
CUresult cuFuncGetParamInfo(void* function, size_t i, size_t* offset, size_t* size) {
  if (i >= fake_count) return kInvalidValue;
  return *offset = 8 * i, *size = fake_sizes[i], loading();
}
CUresult cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* base,
                                const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                                const uint32_t* elements, int interleave, int swizzle,
                                int promotion, int fill) {
  uint64_t words[16] = {type,       rank | 1 << 21, (uint64_t)base, sizes[0],    sizes[1],
                        strides[0], box[0],         box[1],         elements[0], elements[1],
                        interleave, swizzle,        promotion,      fill};
  memcpy(map, words, sizeof words);
  return (uintptr_t)map % 64 ? kInvalidValue : kSuccess;
}
CUresult cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads,
                        unsigned ty, unsigned tz, unsigned shared, void* stream, void** parameters,
                        void** extra) {
  pthread_mutex_lock(&turn);
  fake_last = (struct Launch){{x, y, z}, threads, shared, (uint64_t)stream};
  for (size_t i = 0; i < fake_count; ++i) memcpy(fake_last.bytes[i], parameters[i], fake_sizes[i]);
  pthread_mutex_unlock(&turn);
  ++fake_launches;
  return kSuccess;
}
CUresult cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) {
  ++fake_launches;
  return kSuccess;
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) {
  return kSuccess;
}
