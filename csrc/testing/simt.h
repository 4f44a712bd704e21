// CUDA for kernels that run on the CPU, so that they can be tested where there is no GPU.
//
// Threads of a block are fibers, which run in a random order between barriers. An error is what a
// GPU would not report: threads that disagree about a barrier or a shuffle, shared memory that is
// read before it is written, or that two threads use without a barrier between them, and a global
// access whose address is not a multiple of its size. Accesses to global memory are counted.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads() ::llmos::simt::barrier(__LINE__)
#define __syncwarp() ::llmos::simt::meet(__LINE__, ::llmos::simt::kAllLanes, 0)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace llmos::simt {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

// The thread that runs.
inline dim3 thread_index, block_index, block_size, grid_size;

// Accesses to global memory, by the logarithm of their bytes: 1, 2, 4, 8, 16.
struct Counts {
  int64_t loads[5], stores[5];
};
inline Counts counts;

// End the launch with an error.
[[noreturn]] void fail(const std::string& why);

// Run body() for each thread.
void run(dim3 grid, dim3 block, const std::function<void()>& body);

void barrier(int line);

// The values that lanes of a warp have brought to a meeting.
using Lanes = const uint64_t*;

// Wait until all lanes of mask are here, and return what each of them has brought.
Lanes meet(int line, uint32_t mask, uint64_t value);

int lane();

// One access to shared memory: who, and when.
struct Access {
  int thread = -1;
  int64_t barriers = -1,
          meetings = -1;  // How many there were before, of the block and of the warp.

  static Access now();
  bool conflicts_with(const Access& earlier) const;
};

// The accesses to one word of shared memory since it was last written.
struct Word {
  Access write;
  int64_t block = -1;  // The block that wrote it.
  std::vector<Access> reads;

  void on_read();
  void on_write();
};

inline int logarithm(size_t bytes) { return __builtin_ctzll(bytes); }

template <class To>
To load_global(const void* from) {
  if (uintptr_t(from) % sizeof(To))
    fail("a load of " + std::to_string(sizeof(To)) + " bytes is not aligned");
  ++counts.loads[logarithm(sizeof(To))];
  To value;
  std::memcpy(&value, from, sizeof(To));
  return value;
}

template <class From>
void store_global(void* to, const From& value) {
  if (uintptr_t(to) % sizeof(From))
    fail("a store of " + std::to_string(sizeof(From)) + " bytes is not aligned");
  ++counts.stores[logarithm(sizeof(From))];
  std::memcpy(to, &value, sizeof(From));
}

template <class T>
T shuffled(int line, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Lanes lanes = meet(line, mask, bits);
  if (source < 0 || source >= kWarp) return value;
  if (!(mask >> source & 1)) fail("a shuffle reads an absent lane, line " + std::to_string(line));
  std::memcpy(&value, lanes + source, sizeof(T));
  return value;
}

inline uint32_t votes(int line, uint32_t mask, bool vote) {
  const Lanes lanes = meet(line, mask, vote);
  uint32_t all = 0;
  for (int i = 0; i < kWarp; ++i) all |= uint32_t(mask >> i & 1 & lanes[i]) << i;
  return all;
}

}  // namespace llmos::simt

#define threadIdx ::llmos::simt::thread_index
#define blockIdx ::llmos::simt::block_index
#define blockDim ::llmos::simt::block_size
#define gridDim ::llmos::simt::grid_size

#define __shfl_sync(mask, value, source) ::llmos::simt::shuffled(__LINE__, mask, value, source)
#define __shfl_xor_sync(mask, value, with) \
  ::llmos::simt::shuffled(__LINE__, mask, value, ::llmos::simt::lane() ^ (with))
#define __shfl_down_sync(mask, value, by) \
  ::llmos::simt::shuffled(__LINE__, mask, value, ::llmos::simt::lane() + int(by))
#define __ballot_sync(mask, vote) ::llmos::simt::votes(__LINE__, mask, vote)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __all_sync(mask, vote) (__ballot_sync(mask, vote) == (mask))

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return c;
}

inline int __popc(uint32_t v) { return std::popcount(v); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline int __float2int_rn(float v) { return int(std::nearbyint(v)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }

namespace llmos {

// An array in shared memory: `__shared__ Shared<float, 32> sums;`.
template <class T, int N>
class Shared {
 public:
  class Reference {
   public:
    Reference(T& value, simt::Word& word) : value_(value), word_(word) {}
    operator T() const {
      word_.on_read();
      return value_;
    }
    Reference& operator=(const T& value) {
      word_.on_write();
      value_ = value;
      return *this;
    }

   private:
    T& value_;
    simt::Word& word_;
  };

  Reference operator[](int i) {
    if (i < 0 || i >= N)
      simt::fail("index " + std::to_string(i) + " of shared memory [" + std::to_string(N) + "]");
    return {values_[i], words_[i]};
  }

 private:
  T values_[N];
  simt::Word words_[N];
};

}  // namespace llmos
