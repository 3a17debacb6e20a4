// Counters that say that a call makes progress, while it runs: another thread reads them.
#pragma once

#include <omp.h>

#include <cstdint>

#include "memory_ops/native/simd.h"

namespace memplus {

constexpr int PROGRESS_COUNTERS = 64;  // as in library.py

// Counters LINE bytes apart, so that threads do not wait for each other's; threads beyond their
// number share them.
struct Progress {
  int64_t* counters;

  // Says that the calling thread did a piece of work, of microseconds at least. A mark that is lost
  // between two threads does no harm: the counter has changed.
  void mark() const {
    int64_t* own = counters + omp_get_thread_num() % PROGRESS_COUNTERS * (LINE / sizeof(int64_t));
    __atomic_store_n(own, __atomic_load_n(own, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED);
  }
};

}  // namespace memplus
