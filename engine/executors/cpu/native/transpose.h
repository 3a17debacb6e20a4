// Transposes a square of words.
#pragma once

#include "memory_ops/native/simd.h"

namespace memplus {

// Transposes LANES vectors: lane i of vector j becomes lane j of vector i.
template <int HALF = LANES / 2>
inline __attribute__((always_inline)) void transpose(words* vectors) {
  const ints lanes = lane_numbers();
  const ints low = (lanes & HALF) == 0 ? lanes : (lanes ^ HALF) + LANES;
  const ints high = (lanes & HALF) == 0 ? lanes ^ HALF : lanes + LANES;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) {
    if (i & HALF) continue;
    const words a = vectors[i], b = vectors[i + HALF];
    vectors[i] = __builtin_shuffle(a, b, low);
    vectors[i + HALF] = __builtin_shuffle(a, b, high);
  }
  if constexpr (HALF > 1) transpose<HALF / 2>(vectors);
}

}  // namespace memplus
