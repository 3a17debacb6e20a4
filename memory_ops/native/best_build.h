// Which of a library's builds is the best that this machine can run; portable.cpp has it, and
// defines MEMPLUS_HAS_BF16_BUILD where there is one for AVX-512's bf16 products.
#pragma once

extern "C" const char* memplus_best_build() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // by level, not by feature: what the flags of a build allow is all of its level
#if defined(MEMPLUS_HAS_BF16_BUILD)
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"))
    return "avx512_bf16";
#endif
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "portable";
}
