// Parts of the keys that a tile of queries attends to.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_call.h"
#include "kv_areas.h"
#include "matrix_tiles.h"
#include "memory_ops/native/simd.h"

namespace memplus {

constexpr int64_t PART = 128;  // keys
constexpr int64_t PART_VECTORS = PART / LANES;

inline int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Rows of the buffers of a tile; products may compute more rows than the tile has.
inline int64_t buffer_rows(const Attention& call) {
  return rounded_up(call.tile_queries() * call.group_heads(), TILE_HEIGHT);
}

// Some keys of a tile, from number `first` on. Kernels read multiples of SHOWN keys.
template <int64_t SHOWN>
struct KeyPart {
  const QueryTile* tile;
  int64_t first, count;
  int64_t rows, before, seen;  // rows; keys before the first query, and up to the last
  // of each QUAD of tokens: the first key, and the line of the first value; behind the last token, any
  // key and no line
  const uint8_t *keys[PART / QUAD], *lines[PART / QUAD];

  int64_t shown() const { return rounded_up(count, SHOWN); }
};

}  // namespace memplus
