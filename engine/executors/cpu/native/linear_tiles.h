// The bf16 products of linear.h on the matrix tiles of Intel's AMX: 16 x 16 sums of 32 inputs per
// instruction. An output depends on its own row alone and is the same in any batch.
#pragma once

#include <algorithm>

#include "linear_call.h"
#include "matrix_tiles.h"

namespace memplus {

// Whether products of these values use tiles.
template <class Values>
constexpr bool has_tiles = false;

template <class Values>
void run_panels_by_tiles(const LinearCall& call, Rows rows, Span panels);

#if defined(__AMX_BF16__)
template <>
inline constexpr bool has_tiles<Bf16Values> = true;

constexpr int64_t FETCHED = 8192;  // prefetch distance in bytes, if few rows read the panel

// Prefetches `lines` consecutive cache lines in each round of a product.
struct LineFetch {
  const uint8_t* at;
  int64_t lines;

  void next() {
    for (int64_t line = 0; line < lines; line++) __builtin_prefetch(at + line * LINE, 0, 2);
    at += lines * LINE;
  }
};

// Sums of one tile of rows and one panel, or of two tiles whose rows begin at `x` and `other`.
template <bool HAS_OTHER>
inline void multiply_tiles(const uint8_t* x, const uint8_t* other, int64_t stride,
                           const uint8_t* panel, int64_t steps, LineFetch fetch,
                           floats (*sums)[PANEL_VECTORS]) {
  constexpr int64_t step_bytes = PANEL_VECTORS * sizeof(words);
  settle();
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

// Computes panels [panels.first, panels.last) of the outputs of `rows`.
template <>
inline void run_panels_by_tiles<Bf16Values>(const LinearCall& call, Rows rows, Span panels) {
  const PackedLinear& linear = call.linear;
  const int64_t count = rows.last - rows.first, tiles = (count + TILE_HEIGHT - 1) / TILE_HEIGHT;
  const int64_t steps = linear.steps(), panel_bytes = linear.panel_bytes();
  const int64_t height = std::min(count, TILE_HEIGHT);
  // the last tile overlaps the previous one, so that it is full
  const auto first_row = [&](int64_t tile) { return std::min(tile * TILE_HEIGHT, count - height); };
  const auto at = [&](int64_t row) { return rows.x + (rows.first + row) * rows.stride; };
  const int64_t lines = PANEL_VECTORS * TILE_STEPS / ((tiles + 1) / 2);
  floats sums[2 * TILE_HEIGHT][PANEL_VECTORS];
  shape_tiles(height);
  for (int64_t panel = panels.first; panel < panels.last; panel++) {
    const uint8_t* weights = linear.panels + panel * panel_bytes;
    const int64_t block_at = panel / linear.block_panels() * linear.row_bytes();
    const PanelOutputs<Bf16Values> outputs(call, panel);
    LineFetch fetch = {weights + (tiles > 2 ? panel_bytes : FETCHED), lines};
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const int64_t first = first_row(tile), other = first_row(tile + 1);
      const bool has_other = tile + 1 < tiles;
      (has_other ? multiply_tiles<true> : multiply_tiles<false>)(
          at(first) + block_at, at(other) + block_at, rows.stride, weights, steps, fetch, sums);
      fetch.at += lines * LINE * (steps / TILE_STEPS);
      const int64_t end = std::min((tile + 2) * TILE_HEIGHT, count);
      for (int64_t row = tile * TILE_HEIGHT; row < end; row++) {
        const bool is_other = row >= (tile + 1) * TILE_HEIGHT;
        const int64_t place = is_other ? TILE_HEIGHT + row - other : row - first;
        outputs.write(rows.first + row, sums[place]);
      }
      call.progress.mark();
    }
  }
  _tile_release();
}
#endif

}  // namespace memplus
