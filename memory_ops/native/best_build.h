// Which of a library's builds is the best that this machine can run; portable.cpp has it, and
// defines MEMPLUS_HAS_BF16_BUILDS where there are some for bf16 products.
#pragma once

#if defined(MEMPLUS_HAS_BF16_BUILDS) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

// Matrix tiles are a process's to use once it has asked for them.
inline bool may_use_tiles() {
  constexpr long ask_for_feature = 0x1023, tile_data = 18;  // arch_prctl's numbers
  return __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, ask_for_feature, tile_data) == 0;
}
#endif

extern "C" const char* memplus_best_build() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // by level, not by feature: what the flags of a build allow is all of its level
#if defined(MEMPLUS_HAS_BF16_BUILDS)
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"))
    return may_use_tiles() ? "avx512_amx" : "avx512_bf16";
#endif
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "portable";
}
