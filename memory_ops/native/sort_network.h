// Sorts 16 to 256 numbers without branches, in a bitonic network: on fresh data a comparison sort
// mispredicts half of its comparisons.
#pragma once

#include "simd.h"

namespace memplus {

constexpr int WIDTH = LANES / 2;  // numbers in one vector
constexpr int LEAST_SORTED = 16;

inline longs long_lane_numbers() {
  longs lanes{};
  for (int lane = 0; lane < WIDTH; lane++) lanes[lane] = lane;
  return lanes;
}

// Lane l gets lane l ^ FLIPPED.
template <int FLIPPED>
inline longs partners(longs v) {
  return __builtin_shuffle(v, long_lane_numbers() ^ FLIPPED);
}

// Puts the larger number of each pair of lanes into the lane without bit STRIDE.
template <int STRIDE, int FLIPPED>
inline longs exchange_lanes(longs v) {
  const longs other = partners<FLIPPED>(v);
  return (long_lane_numbers() & STRIDE) == 0 ? larger(v, other) : smaller(v, other);
}

// Sorts the bitonic runs of 2 * STRIDE lanes.
template <int STRIDE>
inline longs merge_lanes(longs v) {
  if constexpr (STRIDE == 0)
    return v;
  else
    return merge_lanes<STRIDE / 2>(exchange_lanes<STRIDE, STRIDE>(v));
}

// Sorts each run of RUN lanes in descending order.
template <int RUN>
inline longs sort_lanes(longs v) {
  if constexpr (RUN == 1)
    return v;
  else  // each run merges with its mirrored neighbour, so that all exchanges have one direction
    return merge_lanes<RUN / 4>(exchange_lanes<RUN / 2, RUN - 1>(sort_lanes<RUN / 2>(v)));
}

// Sorts COUNT numbers, a power of two and a multiple of WIDTH, in descending order.
template <int COUNT>
inline void sort_descending(int64_t* numbers) {
  constexpr int VECTORS = COUNT / WIDTH;
  longs v[VECTORS];
  for (int i = 0; i < VECTORS; i++) v[i] = sort_lanes<WIDTH>(load<longs>(numbers + i * WIDTH));
  for (int run = 2; run <= VECTORS; run *= 2) {
    for (int start = 0; start < VECTORS; start += run) {
      for (int i = 0; i < run / 2; i++) {
        longs& low = v[start + i];
        longs& high = v[start + run - 1 - i];
        const longs mirrored = partners<WIDTH - 1>(high);
        high = partners<WIDTH - 1>(smaller(low, mirrored));
        low = larger(low, mirrored);
      }
    }
    for (int stride = run / 4; stride > 0; stride /= 2) {
      for (int i = 0; i < VECTORS; i++) {
        if (i & stride) continue;
        const longs low = v[i];
        v[i] = larger(low, v[i + stride]);
        v[i + stride] = smaller(low, v[i + stride]);
      }
    }
    for (int i = 0; i < VECTORS; i++) v[i] = merge_lanes<WIDTH / 2>(v[i]);
  }
  for (int i = 0; i < VECTORS; i++) store(numbers + i * WIDTH, v[i]);
}

// Sorts the first `count` <= 256 numbers. The array must hold the next power of two, at least
// LEAST_SORTED.
inline void sort_descending(int64_t* numbers, int count) {
  int padded = LEAST_SORTED;
  while (padded < count) padded *= 2;
  for (int i = count; i < padded; i++) numbers[i] = INT64_MIN;
  switch (padded) {
    case 16: return sort_descending<16>(numbers);
    case 32: return sort_descending<32>(numbers);
    case 64: return sort_descending<64>(numbers);
    case 128: return sort_descending<128>(numbers);
    default: return sort_descending<256>(numbers);
  }
}

}  // namespace memplus
