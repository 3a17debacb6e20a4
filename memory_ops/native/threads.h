// Parallel loops on the team of threads that all libraries share.
#pragma once

#include <cstdint>

#include "team.h"

namespace memplus {

struct Span {
  int64_t first, last;
};

// The part-th of `parts` nearly equal ranges of `count` items.
inline Span piece(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

inline int64_t num_threads() { return team()->num_threads(); }

// The number of the calling thread in its parallel loop.
inline int64_t& this_thread() {
  static thread_local int64_t number = 0;
  return number;
}

// Calls `body(thread, threads)` on at most `most` threads.
template <class Body>
inline void in_parallel(int64_t most, Body body) {
  const int64_t threads = std::min(num_threads(), most);
  if (threads <= 1) return body(0, 1);
  const auto run = [](void* context, int64_t thread, int64_t count) {
    this_thread() = thread;
    (*(Body*)context)(thread, count);
  };
  team()->run(threads, run, &body);
}

// Waits for all threads of a loop of `threads` threads.
inline void barrier(int64_t threads) {
  if (threads > 1) team()->barrier();
}

}  // namespace memplus
