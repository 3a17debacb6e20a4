// Scores of one matrix tile of queries with keys that are read where they lie, for bf16: the keys are
// the rows, so that none of them is laid out anew for queries as few as those of a decode step.
#pragma once

#include "matrix_tiles.h"
#include "transpose.h"

#if defined(__AMX_BF16__)
namespace memplus {

constexpr int64_t TILE_KEYS = TILE_HEIGHT;

// Lays rows of queries out as score_keys() reads them: by words, then by queries.
inline void turn_queries(const floats* queries, int64_t rows, int64_t vectors, floats* turned) {
  for (int64_t v = 0; v < vectors; v++) {
    words lines[LANES] = {};
    for (int64_t row = 0; row < rows; row++) lines[row] = (words)queries[row * vectors + v];
    transpose(lines);
    std::memcpy(turned + v * LANES, lines, sizeof lines);
  }
}

// Scores of some queries with TILE_KEYS keys that lie one after another, each of `vectors` vectors;
// that of query q to sums[q], a vector of keys.
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
