// The arguments of one call of attention.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "progress.h"

namespace memplus {

// maximum rows of one tile, each a query of one head, that read the same keys
#if defined(__AMX_BF16__)
constexpr int64_t SHARING_ROWS = 48;
#else
constexpr int64_t SHARING_ROWS = 24;
#endif

// Norms of each head of queries and keys, before the rotation: weights [E] of the values' type.
struct HeadNorms {
  const uint8_t *query, *key;
  float eps;
};

// Tensors of bf16 or fp32 values; H query heads, G KV heads, E values per head. The areas of KV blocks
// (kv_areas.h) hold such values, or int8.
struct Attention {
  const uint8_t* qkv;              // [T, H + 2 G, E]: queries, keys, values
  const float* cosines;            // [T, E / 2], as are the sines
  const float* sines;
  const HeadNorms* norms;          // or null
  uint8_t* kv;                     // [blocks, G] areas
  const int64_t* block_table;      // [S] rows, table_stride ids apart
  const int64_t* query_starts;     // [S + 1]
  const int64_t* context_lengths;  // [S]
  uint8_t* out;                    // [T, H, E]
  int64_t num_sequences, table_stride, num_heads, num_kv_heads, head_dim, block_size;
  bool has_int8_kv;
  Progress progress;

  int64_t group_heads() const { return num_heads / num_kv_heads; }
  int64_t tile_queries() const { return std::max<int64_t>(1, SHARING_ROWS / group_heads()); }
  int64_t num_tokens() const { return query_starts[num_sequences]; }
  int64_t qkv_heads() const { return num_heads + 2 * num_kv_heads; }
  // index of a head's first value; `head` counts query heads, then keys, then values
  int64_t qkv_place(int64_t token, int64_t head) const {
    return (token * qkv_heads() + head) * head_dim;
  }
  // number of the area of a position of a sequence
  int64_t kv_area(int64_t sequence, int64_t kv_head, int64_t position) const {
    const int64_t block = block_table[sequence * table_stride + position / block_size];
    return block * num_kv_heads + kv_head;
  }
};

// Queries [first, last) of a sequence, for the heads that share one KV head.
struct QueryTile {
  int64_t sequence, kv_head, first, last;
};

}  // namespace memplus
