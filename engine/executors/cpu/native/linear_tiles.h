// Products of linear.h on the matrix tiles of Intel's AMX: 16 x 16 sums of 16 words of inputs per
// instruction. An output depends on its own row alone and is the same in any batch.
#pragma once

#include <algorithm>

#include "linear_call.h"
#include "matrix_tiles.h"

namespace memplus {

template <class Values>
struct ValueProduct;

// Whether this build can compute a product of linear.h by tiles.
template <class Product>
constexpr bool has_tiles = false;

// How it does.
template <class Product>
struct TileProduct;

template <class Values, class Product>
void run_panels_by_tiles(const LinearCall& call, Rows rows, Span panels);

#if defined(__AMX_BF16__)
// Prefetches `lines` consecutive cache lines in each round of a product.
struct LineFetch {
  const uint8_t* at;
  int64_t lines;

  void next() {
    for (int64_t line = 0; line < lines; line++) __builtin_prefetch(at + line * LINE, 0, 2);
    at += lines * LINE;
  }
};

// Multiplies the first `steps` words of one tile of rows, or of two that begin at `x` and `other`,
// by one panel; writes PANEL_VECTORS vectors of sums per row.
template <class Words, bool HAS_OTHER>
inline void multiply_tiles(const uint8_t* x, const uint8_t* other, int64_t stride,
                           const uint8_t* weights, int64_t steps, LineFetch& fetch, void* sums) {
  constexpr int64_t step_bytes = PANEL_VECTORS * sizeof(words);
  settle();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (HAS_OTHER) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; step += TILE_STEPS) {
    _tile_loadd(6, weights + step * step_bytes, step_bytes);
    _tile_loadd(4, x + step * 4, stride);
    _tile_loadd(7, weights + step * step_bytes + sizeof(words), step_bytes);
    Words::multiply();
    if constexpr (HAS_OTHER) {
      _tile_loadd(5, other + step * 4, stride);
      Words::multiply_other();
    }
    fetch.next();
  }
  uint8_t* out = (uint8_t*)sums;
  _tile_stored(0, out, step_bytes);
  _tile_stored(1, out + sizeof(words), step_bytes);
  if constexpr (HAS_OTHER) {
    out += TILE_HEIGHT * step_bytes;
    _tile_stored(2, out, step_bytes);
    _tile_stored(3, out + sizeof(words), step_bytes);
  }
}

// The products of the tiles that shape_tiles() describes.
struct Bf16Words {
  static void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static void multiply_other() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

template <>
inline constexpr bool has_tiles<ValueProduct<Bf16Values>> = true;

template <>
struct TileProduct<ValueProduct<Bf16Values>> {
  static constexpr int64_t row_words = TILE_STEPS;    // of a tile
  static constexpr int64_t round_steps = TILE_STEPS;  // between prefetches
  static constexpr int64_t fetched = 8192;  // prefetch distance in bytes, if few rows read a panel

  // The panel in the form that multiply() reads.
  static const uint8_t* prepare(const uint8_t* panel, int64_t) { return panel; }

  template <bool HAS_OTHER>
  static void multiply(const uint8_t* x, const uint8_t* other, int64_t stride,
                       const uint8_t* panel, int64_t steps, LineFetch fetch,
                       floats (*sums)[PANEL_VECTORS]) {
    multiply_tiles<Bf16Words, HAS_OTHER>(x, other, stride, panel, steps, fetch, sums);
  }
};

// Computes panels [panels.first, panels.last) of the outputs of `rows`.
template <class Values, class Product>
inline void run_panels_by_tiles(const LinearCall& call, Rows rows, Span panels) {
  using Tiles = TileProduct<Product>;
  const PackedLinear& linear = call.linear;
  const int64_t count = rows.last - rows.first, tiles = (count + TILE_HEIGHT - 1) / TILE_HEIGHT;
  const int64_t steps = linear.steps(), panel_bytes = linear.panel_bytes();
  const int64_t height = std::min(count, TILE_HEIGHT);
  // the last tile overlaps the previous one, so that it is full
  const auto first_row = [&](int64_t tile) { return std::min(tile * TILE_HEIGHT, count - height); };
  const auto at = [&](int64_t row) { return rows.x + (rows.first + row) * rows.stride; };
  const int64_t round_lines = Tiles::round_steps * linear.step_bytes() / LINE;
  const int64_t lines = round_lines / ((tiles + 1) / 2);
  floats sums[2 * TILE_HEIGHT][PANEL_VECTORS];
  shape_tiles(height, Tiles::row_words);
  for (int64_t panel = panels.first; panel < panels.last; panel++) {
    const uint8_t* packed = linear.panels + panel * panel_bytes;
    const uint8_t* weights = Tiles::prepare(packed, steps);
    const int64_t block_at = panel / linear.block_panels() * linear.row_bytes();
    const PanelOutputs<Values> outputs(call, panel);
    const bool is_read_once = tiles <= 2 && weights == packed;  // else the next panel is fetched
    LineFetch fetch = {packed + (is_read_once ? Tiles::fetched : panel_bytes), lines};
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const int64_t first = first_row(tile), other = first_row(tile + 1);
      const bool has_other = tile + 1 < tiles;
      (has_other ? Tiles::template multiply<true> : Tiles::template multiply<false>)(
          at(first) + block_at, at(other) + block_at, rows.stride, weights, steps, fetch, sums);
      fetch.at += lines * LINE * (steps / Tiles::round_steps);
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
