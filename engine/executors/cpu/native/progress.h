// Counters by which another thread sees that a running call makes progress.
#pragma once

#include <cstdint>

#include "memory_ops/native/simd.h"
#include "memory_ops/native/threads.h"

namespace memplus {

constexpr int PROGRESS_COUNTERS = 64;  // as in kernels.py

// Counters in separate cache lines, so that threads do not contend; if there are more threads than
// counters, they share them.
struct Progress {
  int64_t* counters;

  // Records a piece of work of the calling thread, of at least microseconds. A lost update between
  // two threads is harmless: the counter has changed.
  void mark() const {
    int64_t* own = counters + this_thread() % PROGRESS_COUNTERS * (LINE / sizeof(int64_t));
    __atomic_store_n(own, __atomic_load_n(own, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED);
  }
};

}  // namespace memplus
