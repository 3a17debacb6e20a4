// Parallel loops on torch's OpenMP threads: one pool, because both use the same OpenMP library.
#pragma once

#include <omp.h>

#include <cstdint>

namespace memplus {

struct Span {
  int64_t first, last;
};

// The part-th of `parts` nearly equal ranges of `count` items.
inline Span piece(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Calls `body(thread, threads)` on at most `most` threads.
template <class Body>
inline void in_parallel(int64_t most, Body body) {
  int threads = omp_get_max_threads();
  if (most < threads) threads = most < 1 ? 1 : (int)most;
  if (threads == 1) return body(0, 1);
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace memplus
