// The CPU levels, and which of them this process uses.
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

enum CpuLevel { Baseline, Avx2, Avx512, Avx512Bf16, Amx, CpuLevels };

inline constexpr const char* cpu_level_names[CpuLevels] = {"baseline", "avx2", "avx512",
                                                           "avx512_bf16", "amx"};

// Whether there are matrix tiles of bfloat16 and int8, kernels for them in this build, and leave of
// the operating system for this process to use them.
inline bool has_tiles() {
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

// The best level this machine can run.
inline CpuLevel cpu_level_supported() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  const bool tiles = bf16 && has_tiles();
  return tiles ? Amx : bf16 ? Avx512Bf16 : avx512 ? Avx512 : avx2 ? Avx2 : Baseline;
#else
  return Baseline;
#endif
}

// The level in use: the best one, or the lower one that LLMOS_CPU_LEVEL names.
inline CpuLevel cpu_level() {
  static const CpuLevel level = [] {
    const CpuLevel best = cpu_level_supported();
    const char* wanted = std::getenv("LLMOS_CPU_LEVEL");
    if (!wanted || !*wanted) return best;
    for (int i = 0; i <= best; ++i)
      if (!std::strcmp(wanted, cpu_level_names[i])) return CpuLevel(i);
    std::string have;
    for (int i = 0; i <= best; ++i) have.append(i ? ", " : "").append(cpu_level_names[i]);
    throw std::invalid_argument("LLMOS_CPU_LEVEL must be one of " + have +
                                " on this machine, got '" + wanted + "'");
  }();
  return level;
}

// Whether it multiplies four int8 at a time (vpdpbusd).
inline bool multiplies_quads() { return cpu_level() >= Avx512Bf16; }

}  // namespace llmos
