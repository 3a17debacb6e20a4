// The layout of keys and values in a KV block: that of the products which read them. An area holds
// those of one KV head, E numbers of BYTES bytes each. Its words are four bytes, S numbers each:
//
//   keys [E / S, block_size]      word k of a token holds numbers S k to S k + S - 1 of its key
//   values [block_size / S, E]    word e of a line holds number e of the values of S tokens
//   scales [2, block_size]        in int8: of the keys, then of the values, in fp32
//
// In int8, keys are spread (rounded_rows.h) and have an offset of 128, so that they are unsigned.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention_call.h"
#include "memory_ops/native/simd.h"

namespace memplus {

constexpr int64_t WORD = sizeof(uint32_t);
constexpr int64_t QUAD = 4;  // block sizes are multiples of it

// The areas of a call. The keys of consecutive tokens begin WORD apart, and so do their scales.
template <int64_t BYTES>
struct KvAreas {
  static constexpr int64_t LINE_TOKENS = WORD / BYTES;
  static constexpr bool HAS_SCALES = BYTES == 1;
  const int64_t head_dim, block_size;

  explicit KvAreas(const Attention& call) : head_dim(call.head_dim), block_size(call.block_size) {}

  int64_t bytes() const { return scales_at() + (HAS_SCALES ? 2 * block_size * WORD : 0); }

  // The key of a token of an area; its words lie key_stride() apart.
  uint8_t* key(uint8_t* area, int64_t token) const { return area + token * WORD; }
  int64_t key_stride() const { return block_size * WORD; }

  // The line that holds the value of a token.
  uint8_t* line(uint8_t* area, int64_t token) const {
    return area + scales_at() / 2 + token / LINE_TOKENS * head_dim * WORD;
  }

  // Distance from a token's key to the scale of this key, and to that of the token's value.
  int64_t key_scale_at() const { return scales_at(); }
  int64_t value_scale_at() const { return scales_at() + block_size * WORD; }

  // Writes the numbers of a key and of a value.
  void write(uint8_t* area, int64_t token, const uint8_t* key, const uint8_t* value) const {
    uint8_t* to = this->key(area, token);
    for (int64_t byte = 0; byte < head_dim * BYTES; byte += WORD, to += key_stride())
      store(to, load<uint32_t>(key + byte));
    to = line(area, token) + token % LINE_TOKENS * BYTES;
    for (int64_t e = 0; e < head_dim; e++) std::memcpy(to + e * WORD, value + e * BYTES, BYTES);
  }

 private:
  int64_t scales_at() const { return 2 * block_size * head_dim * BYTES; }
};

}  // namespace memplus
