// The products of linear.h by the matrix tiles of Intel's AMX, for bf16: 16 x 16 sums an instruction,
// of 32 inputs. An output still depends on its own row alone, and is the same in any company.
#pragma once

#include <algorithm>

#include "matrix_tiles.h"
#include "packed_linear.h"

namespace memplus {

// Fetches `lines` lines in each of a product's rounds, one after another.
struct LineFetch {
  const uint8_t* at;
  int64_t lines;

  void next() {
    for (int64_t line = 0; line < lines; line++) __builtin_prefetch(at + line * LINE, 0, 2);
    at += lines * LINE;
  }
};

// The sums of one tile of rows and one panel, or of two tiles whose rows begin at `x` and `other`.
template <bool HAS_OTHER>
inline void multiply_tiles(const uint8_t* x, const uint8_t* other, int64_t stride,
                           const uint8_t* panel, int64_t steps, LineFetch fetch,
                           floats (*sums)[PANEL_VECTORS]) {
  constexpr int64_t step_bytes = PANEL_VECTORS * sizeof(words);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (HAS_OTHER) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; step += TILE_STEPS) {
    _tile_loadd(6, panel + step * step_bytes, step_bytes);
    _tile_loadd(4, x + step * 4, stride);
    _tile_loadd(7, panel + step * step_bytes + sizeof(words), step_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (HAS_OTHER) {
      _tile_loadd(5, other + step * 4, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    fetch.next();
  }
  uint8_t* out = (uint8_t*)sums;
  _tile_stored(0, out, step_bytes);
  _tile_stored(1, out + sizeof(floats), step_bytes);
  if constexpr (HAS_OTHER) {
    out += TILE_HEIGHT * step_bytes;
    _tile_stored(2, out, step_bytes);
    _tile_stored(3, out + sizeof(floats), step_bytes);
  }
}

}  // namespace memplus
