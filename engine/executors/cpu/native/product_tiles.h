// The bf16 product of product.h on matrix tiles. It reads rows and steps, and writes sums, up to
// whole tiles. Tiles must be configured at full height.
#pragma once

#include "matrix_tiles.h"
#include "product.h"

#if defined(__AMX_BF16__)
namespace memplus {

template <int ROW_TILES, int VECTORS>
inline void add_tile_products(WordRows rows, const VectorLines& lines, int64_t first,
                              VectorRows sums, int64_t steps) {
  const int64_t sum_bytes = sums.stride * sizeof(floats);
  floats *at = sums.at + first, *other_sums = at + TILE_HEIGHT * sums.stride;
  settle();
  _tile_loadd(0, at, sum_bytes);
  if constexpr (VECTORS == 2) _tile_loadd(1, at + 1, sum_bytes);
  if constexpr (ROW_TILES == 2) _tile_loadd(2, other_sums, sum_bytes);
  if constexpr (ROW_TILES == 2 && VECTORS == 2) _tile_loadd(3, other_sums + 1, sum_bytes);
  for (int64_t step = 0; step < steps; step += TILE_STEPS) {
    const int64_t line = step * lines.stride;
    const uint8_t* row = rows.at + step * 4;
    _tile_loadd(6, lines.vectors[first] + line, lines.stride);
    _tile_loadd(4, row, rows.stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (VECTORS == 2) _tile_loadd(7, lines.vectors[first + 1] + line, lines.stride);
    if constexpr (VECTORS == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (ROW_TILES == 2) _tile_loadd(5, row + TILE_HEIGHT * rows.stride, rows.stride);
    if constexpr (ROW_TILES == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (ROW_TILES == 2 && VECTORS == 2) _tile_dpbf16ps(3, 5, 7);
    for (int v = 0; lines.fetched && v < VECTORS; v++)
      for (int64_t next = 0; next < TILE_STEPS; next++)
        __builtin_prefetch(lines.fetched[first + v] + line + next * lines.stride, 0, 2);
  }
  _tile_stored(0, at, sum_bytes);
  if constexpr (VECTORS == 2) _tile_stored(1, at + 1, sum_bytes);
  if constexpr (ROW_TILES == 2) _tile_stored(2, other_sums, sum_bytes);
  if constexpr (ROW_TILES == 2 && VECTORS == 2) _tile_stored(3, other_sums + 1, sum_bytes);
}

template <int ROW_TILES>
inline void add_tile_products(int64_t vectors, WordRows rows, const VectorLines& lines,
                              VectorRows sums, int64_t steps) {
  int64_t first = 0;
  for (; first + 2 <= vectors; first += 2)
    add_tile_products<ROW_TILES, 2>(rows, lines, first, sums, steps);
  if (first < vectors) add_tile_products<ROW_TILES, 1>(rows, lines, first, sums, steps);
}

template <>
inline void add_products<Bf16Values>(int64_t count, int64_t vectors, WordRows rows,
                                     const VectorLines& lines, VectorRows sums, int64_t steps) {
  for (; count > 0; count -= 2 * TILE_HEIGHT) {
    count > TILE_HEIGHT ? add_tile_products<2>(vectors, rows, lines, sums, steps)
                        : add_tile_products<1>(vectors, rows, lines, sums, steps);
    rows.at += 2 * TILE_HEIGHT * rows.stride, sums.at += 2 * TILE_HEIGHT * sums.stride;
  }
}

}  // namespace memplus
#endif
