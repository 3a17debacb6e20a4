// How fast a disk reads rows at random places, when nothing is done with them.
#pragma once

#include <time.h>

#include "memory_ops/native/row_file.h"

namespace memplus {

// Nanoseconds that `count` reads take with `depth` in flight; a negative errno on failure. It returns when all
// have ended: the kernel writes into the buffers until then.
inline int64_t read_rows_ns(const RowFile& from, unsigned depth, int64_t count, uint64_t seed) {
  RingReads reads(from.file, depth);
  if (!reads.is_open()) return -reads.error();
  const int64_t bytes = from.span_bytes();
  std::unique_ptr<uint8_t, decltype(&std::free)> buffers(
      (uint8_t*)std::aligned_alloc(from.buffer_alignment(), depth * bytes), std::free);
  if (!buffers) return -ENOMEM;
  std::vector<int64_t> befores(depth);
  const auto push = [&](uint64_t buffer) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    const int64_t row = (int64_t)((seed >> 20) % from.num_rows);
    befores[buffer] = from.before(row);
    reads.push(from.read_of(row, buffers.get() + buffer * bytes, buffer));
  };
  timespec begun, ended;
  clock_gettime(CLOCK_MONOTONIC, &begun);
  int64_t pushed = 0, under_way = 0, failed = 0;
  for (; pushed < count && pushed < depth; pushed++, under_way++) push((uint64_t)pushed);
  while (under_way) {
    if (const int error = reads.submit(1)) {
      (void)buffers.release();
      return -error;
    }
    ReadDone done;
    while (reads.pop(done)) {
      under_way--;
      if (done.result < befores[done.tag] + from.row_bytes)
        failed = done.result < 0 ? done.result : -EIO;
      if (pushed < count && !failed) {
        push(done.tag);
        pushed++;
        under_way++;
      }
    }
  }
  if (failed) return failed;
  clock_gettime(CLOCK_MONOTONIC, &ended);
  return (ended.tv_sec - begun.tv_sec) * 1'000'000'000 + ended.tv_nsec - begun.tv_nsec;
}

}  // namespace memplus
