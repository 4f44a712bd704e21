// What kernels are written with: element types, wide accesses, sums of a row. One source for nvcc
// and, with csrc/testing/simt.h in place of the CUDA runtime, for a C++ compiler.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "../testing/simt.h"
#endif

#define LLMOS_DEVICE __device__ __forceinline__

namespace llmos {

using bf16 = c10::BFloat16;
using f16 = c10::Half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kMaxThreads = 512;  // So that a thread may have 128 registers.

#if defined(__CUDACC__)
// An array in shared memory: `__shared__ Shared<float, 32> sums;`.
template <class T, int kCount>
struct Shared {
  T values[kCount];
  __device__ T& operator[](int i) { return values[i]; }
};

#endif

constexpr int kWidest = 16;  // The bytes of the widest access.

// kBytes of global memory, read or written at once.
template <int kBytes>
struct alignas(kBytes) Bytes {
  unsigned char at[kBytes];
};
template <>
struct Bytes<4> {
  uint32_t at[1];
};
template <>
struct alignas(8) Bytes<8> {
  uint32_t at[2];
};
template <>
struct alignas(16) Bytes<16> {
  uint32_t at[4];
};

#if defined(__CUDACC__)
template <class To>
LLMOS_DEVICE To load_global(const void* from) {
  return *static_cast<const To*>(from);
}

// Functions of the runtime write 8 and 16 bytes by one instruction; nvcc splits assignments.
template <class From>
LLMOS_DEVICE void store_global(void* to, const From& value) {
  if constexpr (std::is_same_v<From, Bytes<16>>)
    __stcg(static_cast<uint4*>(to), make_uint4(value.at[0], value.at[1], value.at[2], value.at[3]));
  else if constexpr (std::is_same_v<From, Bytes<8>>)
    __stcg(static_cast<uint2*>(to), make_uint2(value.at[0], value.at[1]));
  else
    *static_cast<From*>(to) = value;
}
#else
using simt::load_global, simt::store_global;
#endif

// Read kCount elements, by the widest accesses there are for them.
template <int kCount, class T>
LLMOS_DEVICE void load_raw(const T* from, T (&to)[kCount]) {
  constexpr int kBytes = kCount * int(sizeof(T)), kStep = kBytes < kWidest ? kBytes : kWidest;
#pragma unroll
  for (int at = 0; at < kBytes; at += kStep) {
    const auto bytes = load_global<Bytes<kStep>>(reinterpret_cast<const char*>(from) + at);
    std::memcpy(reinterpret_cast<char*>(to) + at, &bytes, kStep);
  }
}

// Read kCount elements as float.
template <int kCount, class T>
LLMOS_DEVICE void load(const T* from, float (&to)[kCount]) {
  T raw[kCount];
  load_raw(from, raw);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = float(raw[i]);
}

template <int kCount, class T>
LLMOS_DEVICE void store_raw(T* to, const T (&from)[kCount]) {
  constexpr int kBytes = kCount * int(sizeof(T)), kStep = kBytes < kWidest ? kBytes : kWidest;
#pragma unroll
  for (int at = 0; at < kBytes; at += kStep) {
    Bytes<kStep> bytes;
    std::memcpy(&bytes, reinterpret_cast<const char*>(from) + at, kStep);
    store_global(reinterpret_cast<char*>(to) + at, bytes);
  }
}

// Write kCount floats as T, and replace each by what was written.
template <int kCount, class T>
LLMOS_DEVICE void store_rounded(T* to, float (&from)[kCount]) {
  T raw[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    raw[i] = T(from[i]);
    from[i] = float(raw[i]);
  }
  store_raw(to, raw);
}

// Combine the values of all lanes of a warp, in a fixed order.
template <class V, int kCount, class Combine>
LLMOS_DEVICE void over_warp(V (&v)[kCount], Combine combine) {
#pragma unroll
  for (int with = kWarp / 2; with; with /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = combine(v[i], __shfl_xor_sync(kAllLanes, v[i], with));
  }
}

// Combine the values of the threads of a row: those of a warp if blockDim.x is 32, else of a block.
template <class V, int kCount, class Combine>
LLMOS_DEVICE void over_row(V (&v)[kCount], V neutral, Combine combine) {
  __shared__ Shared<V, kCount * kWarp> partial;
  over_warp(v, combine);
  if (blockDim.x == kWarp) return;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  __syncthreads();  // Others may still read what the last call has left.
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) partial[i * kWarp + warp] = v[i];
  }
  __syncthreads();
  const bool is_one = lane < int(blockDim.x) / kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = is_one ? V(partial[i * kWarp + lane]) : neutral;
  over_warp(v, combine);
}

template <int kCount>
LLMOS_DEVICE void sum_over_row(float (&v)[kCount]) {
  over_row(v, 0.0f, [](float a, float b) { return a + b; });
}

}  // namespace llmos
