// Parts of the keys that a tile of queries attends to.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_call.h"
#include "matrix_tiles.h"
#include "memory_ops/native/simd.h"

namespace memplus {

constexpr int64_t PART = 128;  // keys
constexpr int64_t PART_VECTORS = PART / LANES;
#if defined(__AMX_BF16__)
constexpr int FETCH_LOCALITY = 2;  // Intel's L1 cache tracks fewer pending lines than its L2
#else
constexpr int FETCH_LOCALITY = 3;
#endif

inline int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Rows of the buffers of a tile; products may compute more rows than the tile has.
inline int64_t buffer_rows(const Attention& call) {
  return rounded_up(call.tile_queries() * call.group_heads(), TILE_HEIGHT);
}

// Some keys of a tile, from number `first` on. Kernels read multiples of SHOWN: behind the keys,
// `keys` and `values` are padded with zeros.
template <int64_t SHOWN>
struct KeyPart {
  const QueryTile* tile;
  int64_t first, count;
  int64_t rows, before, seen;  // rows; keys before the first query, and up to the last
  const uint8_t *keys[PART + SHOWN], *values[PART + SHOWN];

  int64_t shown() const { return rounded_up(count, SHOWN); }
};

// The number of the next part's keys to prefetch with each key of this part.
template <class Part>
inline int64_t fetched_a_key(const Part& part, const Part& next) {
  return (next.count + part.count - 1) / part.count;
}

// Prefetches rows [first, last) of `count` rows, `size` bytes each.
inline void fetch_rows(const uint8_t* const* rows, int64_t count, int64_t first, int64_t last,
                       int64_t size) {
  for (int64_t i = first; i < std::min(last, count); i++)
    for (int64_t line = 0; line < size; line += 2 * LINE) {
      __builtin_prefetch(rows[i] + line, 0, FETCH_LOCALITY);
      __builtin_prefetch(rows[i] + line + LINE, 0, FETCH_LOCALITY);
    }
}

// A vector of words from the first `left` bytes of a row; zeros follow them.
inline words read_words(const uint8_t* at, int64_t left) {
  if (left >= (int64_t)sizeof(words)) return load<words>(at);
  words last{};
  std::memcpy(&last, at, left);
  return last;
}

}  // namespace memplus
