// Which of a library's builds is the best that this machine can run; portable.cpp has it.
#pragma once

extern "C" const char* memplus_best_build() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // by level, not by feature: what the flags of a build allow is all of its level
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "portable";
}
