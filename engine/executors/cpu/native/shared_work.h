// Work stealing in a team of threads. Each thread has a range of units; when it is done, it takes
// units from the ends of the other ranges. So a preempted thread delays the team by one piece only.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "memory_ops/native/simd.h"
#include "memory_ops/native/threads.h"

namespace memplus {

class SharedWork {
 public:
  explicit SharedWork(int64_t threads) : ranges_(kept_ranges(threads)) {}

  // The most threads that may share the work.
  int64_t size() const { return (int64_t)ranges_.size(); }

  // Sets a thread's part of `count` units, fewer than 2^32, once its last part is empty.
  void give(int64_t count, int64_t thread, int64_t threads) {
    const Span own = piece(count, thread, threads);
    ranges_[thread].units = packed(own.first, own.last);
  }

  // Takes up to `most` units of the thread's own, then of others; returns none if none are left.
  Span take(int64_t most, int64_t thread) {
    const int64_t threads = (int64_t)ranges_.size();
    for (int64_t i = 0; i < threads; i++) {
      std::atomic<uint64_t>& units = ranges_[(thread + i) % threads].units;
      uint64_t seen = units;
      for (;;) {
        const int64_t first = (int64_t)(seen >> 32), last = (int64_t)(uint32_t)seen;
        const int64_t count = std::min(most, last - first);
        if (count <= 0) break;
        const bool is_own = i == 0;
        const Span taken = is_own ? Span{first, first + count} : Span{last - count, last};
        const uint64_t left = is_own ? packed(taken.last, last) : packed(first, taken.first);
        if (units.compare_exchange_weak(seen, left)) return taken;
      }
    }
    return {0, 0};
  }

 private:
  static uint64_t packed(int64_t first, int64_t last) { return (uint64_t)first << 32 | last; }

  struct alignas(LINE) Range {
    std::atomic<uint64_t> units{0};
  };

  // All ranges are empty between calls.
  static std::vector<Range>& kept_ranges(int64_t threads) {
    static thread_local std::vector<Range> kept;
    if ((int64_t)kept.size() < threads) kept = std::vector<Range>(threads);
    return kept;
  }

  std::vector<Range>& ranges_;
};

}  // namespace memplus
