// The matrix tiles of AMX in plain C++. With g++ -include, it compiles kernels that use tiles for
// machines without them. Where a processor would raise an exception, it aborts.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// Products of tiles so far, for tests.
extern "C" std::atomic<int64_t> emulated_products;
std::atomic<int64_t> emulated_products{0};

namespace emulated {

struct Tile {
  int rows, row_bytes;  // 0 unless configured
  uint8_t bytes[16][64];
};

inline thread_local Tile tiles[8];

inline void check(bool holds) {
  if (!holds) std::abort();
}

inline Tile& configured(int tile) {
  check(tiles[tile].rows > 0);
  return tiles[tile];
}

inline void zero(int tile) { std::memset(configured(tile).bytes, 0, sizeof(Tile::bytes)); }

inline void release() { std::memset(tiles, 0, sizeof tiles); }

inline void configure(const void* shapes) {
  const uint8_t* bytes = (const uint8_t*)shapes;
  check(bytes[0] == 1);
  for (int tile = 0; tile < 8; tile++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + tile * 2, 2);
    tiles[tile] = {bytes[48 + tile], row_bytes, {}};
    check(tiles[tile].rows <= 16 && row_bytes <= 64 && (tiles[tile].rows > 0) == (row_bytes > 0));
  }
}

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < tiles[tile].rows; row++)
    std::memcpy(tiles[tile].bytes[row], (const uint8_t*)from + row * stride, tiles[tile].row_bytes);
}

inline void store(int tile, void* to, int64_t stride) {
  const Tile& from = configured(tile);
  for (int row = 0; row < from.rows; row++)
    std::memcpy((uint8_t*)to + row * stride, from.bytes[row], from.row_bytes);
}

// sums[m, n] += products(x[m, k], weights[k, n]) for all words k.
template <class Sum, class Products>
inline void multiply(int sums, int x, int weights, Products products) {
  Tile& out = configured(sums);
  const Tile &left = configured(x), &right = configured(weights);
  check(out.rows == left.rows && out.row_bytes == right.row_bytes);
  check(left.row_bytes == right.rows * 4);
  emulated_products++;
  for (int m = 0; m < out.rows; m++)
    for (int n = 0; n < out.row_bytes; n += 4) {
      Sum sum;
      std::memcpy(&sum, out.bytes[m] + n, 4);
      for (int k = 0; k < right.rows; k++)
        sum += products(left.bytes[m] + k * 4, right.bytes[k] + n);
      std::memcpy(out.bytes[m] + n, &sum, 4);
    }
}

inline void multiply_bytes(int sums, int x, int weights) {
  multiply<int32_t>(sums, x, weights, [](const uint8_t* left, const uint8_t* right) {
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) sum += (int8_t)left[i] * right[i];
    return sum;
  });
}

inline float bf16(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, 2);
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void multiply_bf16(int sums, int x, int weights) {
  multiply<float>(sums, x, weights, [](const uint8_t* left, const uint8_t* right) {
    return bf16(left) * bf16(right) + bf16(left + 2) * bf16(right + 2);
  });
}

}  // namespace emulated

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply_bf16
#define _tile_dpbsud emulated::multiply_bytes
