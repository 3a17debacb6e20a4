// The products of weight_groups.h on matrix tiles. One instruction sums a group of inputs for 16
// rows and 16 outputs. It could sum twice as many inputs, but each group has its own scales.
// The integers are exact and GroupScales adds them, so the bits are those of GroupProduct.
//
// Not timed: no machine with AMX-INT8 was at hand. docs/benchmarks.md counts the instructions.
#pragma once

#include <algorithm>

#include "kept.h"
#include "linear_tiles.h"
#include "weight_groups.h"

#if defined(__AMX_INT8__)
namespace memplus {

// As Bf16Words; rows are signed and weights unsigned.
struct ByteWords {
  static void multiply() {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
  }
  static void multiply_other() {
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
};

template <int BITS, bool HAS_MINIMUMS>
inline constexpr bool has_tiles<GroupProduct<BITS, HAS_MINIMUMS>> = true;

template <int BITS, bool HAS_MINIMUMS>
struct TileProduct<GroupProduct<BITS, HAS_MINIMUMS>> {
  static constexpr int64_t row_words = GROUP / 4;
  static constexpr int64_t round_steps = 1;
  static constexpr int64_t fetched = 8192;

  // The panel with 8 bits per weight, for all rows.
  static const uint8_t* prepare(const uint8_t* panel, int64_t steps) {
    if (BITS == 8) return panel;
    constexpr int64_t packed_bytes = Packed::STEP_BYTES - SCALES;
    uint8_t* const prepared = kept_bytes<TileProduct>(steps * Bytes::STEP_BYTES);
    uint8_t* to = prepared;
    for (int64_t step = 0; step < steps; step++) {
      std::memcpy(to, panel, SCALES);
      panel += SCALES, to += SCALES;
      for (int part = 0; part < 8 / BITS; part++, to += packed_bytes)
        for (int64_t at = 0; at < packed_bytes; at += sizeof(words))
          store(to + at, unpacked<BITS>(load<words>(panel + at), part));
      panel += packed_bytes;
    }
    return prepared;
  }

  template <bool HAS_OTHER>
  static void multiply(const uint8_t* x, const uint8_t* other, int64_t stride,
                       const uint8_t* panel, int64_t steps, LineFetch fetch,
                       floats (*sums)[PANEL_VECTORS]) {
    ints products[2 * TILE_HEIGHT][PANEL_VECTORS];
    std::fill_n(sums[0], (HAS_OTHER ? 2 : 1) * TILE_HEIGHT * PANEL_VECTORS, floats{});
    for (int64_t step = 0; step < steps; step++) {
      const int64_t at = step * sizeof(RowGroup);
      const uint8_t* weights = panel + step * Bytes::STEP_BYTES;
      multiply_tiles<ByteWords, HAS_OTHER>(x + at, other + at, stride, weights + SCALES, row_words,
                                           fetch, products);
      const Scales scales(weights);
      add_products(scales, x + at, stride, products, sums);
      if (HAS_OTHER)
        add_products(scales, other + at, stride, products + TILE_HEIGHT, sums + TILE_HEIGHT);
    }
    Packed::add_outliers(TILE_HEIGHT, x, stride, panel, steps, sums);
    if (HAS_OTHER)
      Packed::add_outliers(TILE_HEIGHT, other, stride, panel, steps, sums + TILE_HEIGHT);
  }

 private:
  using Packed = GroupProduct<BITS, HAS_MINIMUMS>;
  using Bytes = GroupProduct<8, HAS_MINIMUMS>;
  using Scales = GroupScales<HAS_MINIMUMS>;
  static constexpr int64_t SCALES = scale_bytes(HAS_MINIMUMS);

  // Adds the products of the groups at `x`, `stride` bytes apart, to the sums of their rows.
  static void add_products(const Scales& scales, const uint8_t* x, int64_t stride,
                           const ints (*products)[PANEL_VECTORS], floats (*sums)[PANEL_VECTORS]) {
    for (int64_t row = 0; row < TILE_HEIGHT; row++) {
      const RowGroup& group = *(const RowGroup*)(x + row * stride);
      ints started[PANEL_VECTORS];
      for (int v = 0; v < PANEL_VECTORS; v++) started[v] = products[row][v] + Scales::start(group);
      scales.add(group, started, sums[row]);
    }
  }
};

}  // namespace memplus
#endif
