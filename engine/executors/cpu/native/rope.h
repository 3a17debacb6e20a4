// Rotary position embedding of one head (arXiv 2104.09864).
#pragma once

#include <cstdint>

namespace memplus {

// Rotates the pairs of lanes e and e + half by their angles; Hugging Face pairs lanes so too.
inline void rotate(float* values, const float* cosines, const float* sines, int64_t half) {
  for (int64_t e = 0; e < half; e++) {
    const float first = values[e], second = values[half + e];
    values[e] = first * cosines[e] - second * sines[e];
    values[half + e] = second * cosines[e] + first * sines[e];
  }
}

}  // namespace memplus
