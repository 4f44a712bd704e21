// Multiply-adds without memory, by the instructions with which the micro-kernels multiply.
#include "../peak.h"

#include "microkernel.h"

namespace llmos {
namespace {

// As many sums as hide the latency of an instruction, and fit in the registers of AVX2.
constexpr int kSums = 12;

template <class Word>
[[gnu::noinline]] int64_t in_registers(int64_t rounds) {
  AccumulatorVectorOf<Word> sums[kSums] = {};
  U32 a = {}, b = {};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) {
      sums[s] = multiply_add<Word>(a, b, sums[s]);
      // Neither the sum nor the product may be left out as known.
#if defined(__AVX512F__)
      asm volatile("" : "+v"(sums[s]), "+v"(a), "+v"(b));
#elif defined(__SSE2__)
      asm volatile("" : "+x"(sums[s]), "+x"(a), "+x"(b));
#else
      asm volatile("" : "+m"(sums[s]), "+m"(a), "+m"(b));
#endif
    }
  }
  return rounds * kSums * kLanes * 2 * kPerWord<Word>;
}

#if defined(__AMX_TILE__)
template <class Word>
[[gnu::noinline]] int64_t in_tiles(int64_t rounds) {
  const AmxScope amx;
  configure_amx_tiles({kTileRows, kTileRows, kTileWords});
  alignas(64) static const uint32_t zeros[kTileRows * kTileWords] = {};
  _tile_loadd(4, zeros, 64);
  _tile_loadd(6, zeros, 64);
#define LLMOS_TILE_MULTIPLY(to) \
  if constexpr (kIsInt<Word>)   \
    _tile_dpbsud(to, 4, 6);     \
  else                          \
    _tile_dpbf16ps(to, 4, 6)
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < rounds; ++i) {
    LLMOS_TILE_MULTIPLY(0);
    LLMOS_TILE_MULTIPLY(1);
    LLMOS_TILE_MULTIPLY(2);
    LLMOS_TILE_MULTIPLY(3);
  }
#undef LLMOS_TILE_MULTIPLY
  return rounds * 4 * kTileRows * kTileWords * kLanes * 2 * kPerWord<Word>;
}
#endif

template <class T>
int64_t run(int64_t rounds) {
  using Word = WordOf<T>;
#if defined(__AMX_TILE__)
  if constexpr (kUsesAmx<Word>) return in_tiles<Word>(rounds);
#endif
  return in_registers<Word>(rounds);
}

template <class T, bool kRegister = kIsaBenefits<T> || std::is_same_v<T, int8_t>>
struct RegisterPeak {
  Register<MultiplyAddsFn> entry{LLMOS_ISA, multiply_adds<T>, &run<T>};
};
template <class T>
struct RegisterPeak<T, false> {};

const RegisterPeak<float> register_f32;
const RegisterPeak<bf16> register_bf16;
const RegisterPeak<int8_t> register_int8;

}  // namespace
}  // namespace llmos
