// The limits that lookups are measured against: loops that do nothing but read.
#pragma once

#include <algorithm>
#include <atomic>

#include "memory_ops/native/simd.h"
#include "memory_ops/native/threads.h"

namespace memplus {

// Reads whole vectors, so that no other work can be what takes the time, and what is left of a row.
inline words read_bytes(const uint8_t* from, int64_t bytes, words seen) {
  const int64_t whole = bytes - bytes % (int64_t)sizeof seen;
  for (int64_t at = 0; at < whole; at += sizeof seen) seen ^= load<words>(from + at);
  if (whole == bytes) return seen;
  words last{};
  std::memcpy(&last, from + whole, bytes - whole);
  return seen ^ last;
}

inline uint32_t folded(words seen) {
  std::atomic<uint32_t> result{0};
  for (int lane = 0; lane < LANES; lane++) result ^= seen[lane];
  return result;
}

// How random rows are read: a cache line of each row of a `group`, then the next lines, prefetching
// the row that is `ahead` further on (0: none).
struct RowOrder {
  int64_t group, ahead;
};

// Reads `row_bytes` bytes of each row, on all threads. LOCALITY is that of __builtin_prefetch.
// Returns a value that depends on all bytes, so that the compiler keeps the reads.
template <int LOCALITY>
inline uint32_t read_rows(const uint8_t* data, int64_t row_bytes, const int64_t* ids, int64_t count,
                          RowOrder order) {
  std::atomic<uint32_t> result{0};
  in_parallel(count, [&](int64_t thread, int64_t threads) {
    const Span mine = piece(count, thread, threads);
    words seen{};
    for (int64_t first = mine.first; first < mine.last; first += order.group) {
      const int64_t last = std::min(first + order.group, mine.last);
      for (int64_t at = 0; at < row_bytes; at += LINE)
        for (int64_t i = first; i < last; i++) {
          const int64_t next = i + order.ahead < mine.last ? i + order.ahead : i;
          if (order.ahead) __builtin_prefetch(data + ids[next] * row_bytes + at, 0, LOCALITY);
          const uint8_t* line = data + ids[i] * row_bytes + at;
          seen = read_bytes(line, std::min<int64_t>(LINE, row_bytes - at), seen);
        }
    }
    result ^= folded(seen);
  });
  return result;
}

// Reads `bytes` bytes, a multiple of 64, from first to last, each thread a part.
inline uint32_t read_all(const uint8_t* data, int64_t bytes) {
  std::atomic<uint32_t> result{0};
  in_parallel(bytes / LINE, [&](int64_t thread, int64_t threads) {
    const Span mine = piece(bytes / LINE, thread, threads);
    const words seen =
        read_bytes(data + mine.first * LINE, (mine.last - mine.first) * LINE, words{});
    result ^= folded(seen);
  });
  return result;
}

}  // namespace memplus
