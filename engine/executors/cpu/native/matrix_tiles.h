// Matrix tiles, the registers of Intel's AMX: 16 rows of 64 bytes, multiplied by one instruction.
//
//   sums[r, n] += sum over k of x[r, k] * weights[k, n]
//
// Each k is a word of two bf16 values or four bytes. A row of sums depends on that row of x alone.
#pragma once

#include <cstdint>
#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace memplus {

#if !defined(__AMX_BF16__)
constexpr int64_t TILE_STEPS = 1, TILE_HEIGHT = 1;  // this build has no tiles
#else
constexpr int64_t TILE_STEPS = 16;   // words per row
constexpr int64_t TILE_HEIGHT = 16;  // rows

// The argument of ldtilecfg.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Makes earlier writes visible to tile loads.
inline void settle() { asm volatile("" : : : "memory"); }

// Configures the tiles for x of `height` rows of `steps` words, and zeroes them: tiles 0 and 1 hold
// the sums of tile 4 with tiles 6 and 7, tiles 2 and 3 those of tile 5.
inline void shape_tiles(int64_t height, int64_t steps = TILE_STEPS) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; tile++) {
    const bool is_x = tile == 4 || tile == 5;
    shapes.row_bytes[tile] = (uint16_t)(is_x ? steps * 4 : 64);
    shapes.rows[tile] = (uint8_t)(tile < 6 ? height : steps);
  }
  // the compiler does not know which memory the tile intrinsics read
  asm volatile("" : : "m"(shapes));
  _tile_loadconfig(&shapes);
}
#endif

// During its lifetime, the thread's tiles have full height.
struct UseOfTiles {
#if defined(__AMX_BF16__)
  UseOfTiles() { shape_tiles(TILE_HEIGHT); }
  ~UseOfTiles() { _tile_release(); }
#endif
};

}  // namespace memplus
