// Per-thread buffers reused between calls, so that later steps allocate nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "memory_ops/native/simd.h"

namespace memplus {

// `Name` distinguishes buffers; growing one discards its contents.
template <class Name>
inline floats* kept_vectors(int64_t count) {
  static thread_local std::vector<floats> kept;
  if ((int64_t)kept.size() < count) kept = std::vector<floats>(count);
  return kept.data();
}

template <class Name>
inline uint8_t* kept_bytes(int64_t count) {
  return (uint8_t*)kept_vectors<Name>((count + sizeof(floats) - 1) / sizeof(floats));
}

}  // namespace memplus
