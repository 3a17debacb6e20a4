// The clock of waits and pauses.
#pragma once

#include <time.h>

#include <cstdint>

namespace memplus {

inline int64_t monotonic_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

}  // namespace memplus
