// The layout of keys and values in a KV block: that of the products which read them. An area holds
// the keys, or the values, of one KV head. Its words are four bytes, S = 4 / BYTES numbers each:
//
//   keys [E / S, block_size]      word k of a token holds numbers S k to S k + S - 1 of its key
//   values [block_size / S, E]    word e of a line holds number e of the values of S tokens
#pragma once

#include <cstdint>
#include <cstring>

#include "memory_ops/native/simd.h"

namespace memplus {

constexpr int64_t WORD = sizeof(uint32_t);
constexpr int64_t QUAD = 4;  // block sizes are multiples of it

template <int64_t BYTES>
struct KvAreas {
  static constexpr int64_t LINE_TOKENS = WORD / BYTES;

  // Where the first word of a token's key lies, its other words being `block_size` words apart.
  static int64_t key_at(int64_t token) { return token * WORD; }

  // Where the line that holds a token's value begins.
  static int64_t line_at(int64_t token, int64_t head_dim) {
    return token / LINE_TOKENS * head_dim * WORD;
  }

  static void write_key(uint8_t* area, const uint8_t* key, int64_t head_dim, int64_t block_size,
                        int64_t token) {
    uint8_t* to = area + key_at(token);
    for (int64_t byte = 0; byte < head_dim * BYTES; byte += WORD, to += block_size * WORD)
      store(to, load<uint32_t>(key + byte));
  }

  static void write_value(uint8_t* area, const uint8_t* value, int64_t head_dim, int64_t token) {
    uint8_t* to = area + line_at(token, head_dim) + token % LINE_TOKENS * BYTES;
    for (int64_t e = 0; e < head_dim; e++) std::memcpy(to + e * WORD, value + e * BYTES, BYTES);
  }
};

}  // namespace memplus
