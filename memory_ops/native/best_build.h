// Finds the best build that this machine can run. portable.cpp includes it, and defines
// MEMPLUS_HAS_BF16_BUILDS if its library has builds for bf16 products.
#pragma once

#if defined(MEMPLUS_HAS_BF16_BUILDS) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

// A process must request the use of matrix tiles.
inline bool may_use_tiles() {
  constexpr long ask_for_feature = 0x1023, tile_data = 18;  // arch_prctl's numbers
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, ask_for_feature, tile_data) == 0;
}
#endif

extern "C" const char* memplus_best_build() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // by level, not by feature: the flags of a build allow its whole level
#if defined(MEMPLUS_HAS_BF16_BUILDS)
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"))
    return may_use_tiles() ? "avx512_amx" : "avx512_bf16";
#endif
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "portable";
}
