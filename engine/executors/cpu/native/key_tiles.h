// Scores of one matrix tile of queries with bf16 keys, read in place: the keys are the tile's rows.
// So the few queries of a decode step need no copy of the keys in another layout.
#pragma once

#include "matrix_tiles.h"
#include "transpose.h"

#if defined(__AMX_BF16__)
namespace memplus {

constexpr int64_t TILE_KEYS = TILE_HEIGHT;

// Arranges rows of queries for score_keys(): by words, then by queries.
inline void turn_queries(const floats* queries, int64_t rows, int64_t vectors, floats* turned) {
  for (int64_t v = 0; v < vectors; v++) {
    words lines[LANES] = {};
    for (int64_t row = 0; row < rows; row++) lines[row] = (words)queries[row * vectors + v];
    transpose(lines);
    std::memcpy(turned + v * LANES, lines, sizeof lines);
  }
}

// Scores queries with TILE_KEYS consecutive keys of `vectors` vectors each; writes the scores of
// query q to sums[q], a vector over keys.
inline void score_keys(const uint8_t* keys, int64_t vectors, const floats* turned, words* sums) {
  settle();
  _tile_zero(0);
  for (int64_t v = 0; v < vectors; v++) {
    _tile_loadd(6, turned + v * LANES, sizeof(floats));
    _tile_loadd(4, keys + v * sizeof(floats), vectors * sizeof(floats));
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, sums, sizeof(words));
  transpose(sums);
}

}  // namespace memplus
#endif
