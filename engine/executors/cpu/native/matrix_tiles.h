// Matrix tiles, the registers of Intel's AMX: 16 rows of 64 bytes, multiplied by one instruction.
//
//   sums[r, n] += sum over k of x[r, k] * weights[k, n]
//
// where each k is a word of two bf16 values. A row of sums depends on that row of x alone.
#pragma once

#include <cstdint>
#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace memplus {

#if !defined(__AMX_BF16__)
constexpr int64_t TILE_STEPS = 1, TILE_HEIGHT = 1;  // there are none
#else
constexpr int64_t TILE_STEPS = 16;   // words of a row
constexpr int64_t TILE_HEIGHT = 16;  // rows

// The argument of ldtilecfg.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// What was written is there to be loaded into tiles.
inline void settle() { asm volatile("" : : : "memory"); }

// Shapes the tiles for x of `height` rows: tiles 0 and 1 for the sums of tile 4 with tiles 6 and 7,
// tiles 2 and 3 for those of tile 5. All become 0.
inline void shape_tiles(int64_t height) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; tile++) {
    shapes.row_bytes[tile] = 64;
    shapes.rows[tile] = (uint8_t)(tile < 6 ? height : TILE_HEIGHT);
  }
  // the intrinsic, and those that load tiles, do not say what memory they read
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}
#endif

// While it lives, a thread's tiles are of full height.
struct UseOfTiles {
#if defined(__AMX_BF16__)
  UseOfTiles() { shape_tiles(TILE_HEIGHT); }
  ~UseOfTiles() { _tile_release(); }
#endif
};

}  // namespace memplus
