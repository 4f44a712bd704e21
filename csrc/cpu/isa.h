// The instruction sets (ISAs) that kernels are compiled for, and the one that this process uses.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmos {

enum Isa { Baseline, Avx2, Avx512, Avx512Bf16, Amx, kIsaCount };

inline constexpr const char* isa_names[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16",
                                                     "amx"};

// Return true if AMX (for bfloat16 and int8) can be used: the CPU has it, this build has kernels
// for it, and Linux grants this process the tile registers.
inline bool has_amx() {
#if defined(LLMOS_AMX) && defined(__linux__)
  constexpr unsigned kWanted = 1 << 22 | 1 << 24 | 1 << 25;  // AMX-BF16, AMX-TILE, AMX-INT8.
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
  static const bool has = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kWanted) == kWanted &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}

inline bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Return the best ISA that this machine can run.
inline Isa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  const bool amx = bf16 && has_amx();
  return amx ? Amx : bf16 ? Avx512Bf16 : avx512 ? Avx512 : avx2 ? Avx2 : Baseline;
#else
  return Baseline;
#endif
}

// Return the ISA in use: the best one, or the lower one that LLMOS_CPU_LEVEL names.
inline Isa isa_in_use() {
  static const Isa isa = [] {
    const Isa best = best_isa();
    const char* wanted = std::getenv("LLMOS_CPU_LEVEL");
    if (!wanted || !*wanted) return best;
    for (int i = 0; i <= best; ++i)
      if (!std::strcmp(wanted, isa_names[i])) return Isa(i);
    std::string have;
    for (int i = 0; i <= best; ++i) have.append(i ? ", " : "").append(isa_names[i]);
    throw std::invalid_argument("LLMOS_CPU_LEVEL must be one of " + have +
                                " on this machine, got '" + wanted + "'");
  }();
  return isa;
}

// Return true if int8 kernels multiply four int8 pairs per lane (vpdpbusd, AMX), which takes
// zero-point corrections.
inline bool has_vnni() { return isa_in_use() >= Avx512Bf16; }

}  // namespace llmos
