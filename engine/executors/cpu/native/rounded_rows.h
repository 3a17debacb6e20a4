// Rows rounded to integers with one scale, after outliers were spread over the row.
#pragma once

#include "values.h"

namespace memplus {

inline int32_t largest(ints lanes) {
  for (int half = LANES / 2; half; half /= 2)
    lanes = larger(lanes, __builtin_shuffle(lanes, lane_numbers() ^ half));
  return lanes[0];
}

inline int32_t sum(ints lanes) {
  for (int half = LANES / 2; half; half /= 2) lanes += __builtin_shuffle(lanes, lane_numbers() ^ half);
  return lanes[0];
}

// Rounds values, which zeros pad to whole vectors, to integers of up to `most`; passes each vector
// to `take(first, lanes, integers)` and returns the scale. NaN or infinity make it NaN. If the
// largest value is not finite, or so small that `most` divided by it is not, all integers are 0.
template <class Take>
inline float round_values(const floats* values, int64_t count, float most, Take take) {
  ints sizes{};  // their bits: those of NaN are above all others
  by_vectors(count, [&](int64_t v, int64_t, int64_t) {
    sizes = larger(sizes, (ints)values[v] & 0x7fffffff);
  });
  const int32_t bits = largest(sizes);
  const float size = load<float>(&bits);
  const bool is_rounded = size >= most * 0x1p-126f && size - size == 0;
  const floats factor = splat(is_rounded ? most / size : 0.f);
  by_vectors(count, [&](int64_t v, int64_t at, int64_t lanes) {
    take(at, lanes, is_rounded ? to_nearest(values[v] * factor) : ints{});
  });
  return size / most + (size - size);
}

// Values that spread() mixes with each other, a power of two.
inline int64_t spread_block(int64_t count) { return count & -count; }

// Multiplies each block of values, which zeros pad to whole vectors, by a Hadamard matrix: outliers
// spread over the block, so that rounding it costs less (arXiv 2404.00456). The products of two
// such rows are block times as large.
inline void spread(floats* values, int64_t count) {
  const int64_t block = spread_block(count), vectors = (count + LANES - 1) / LANES;
  const ints lanes = lane_numbers();
  for (int half = 1; half < std::min<int64_t>(block, LANES); half *= 2)
    for (int64_t v = 0; v < vectors; v++) {
      const floats other = __builtin_shuffle(values[v], lanes ^ half);
      values[v] = other + ((lanes & half) != 0 ? -values[v] : values[v]);
    }
  for (int64_t half = 1; half * LANES < block; half *= 2)
    for (int64_t v = 0; v < vectors; v++) {
      if (v & half) continue;
      const floats first = values[v], second = values[v + half];
      values[v] = first + second, values[v + half] = first - second;
    }
}

}  // namespace memplus
