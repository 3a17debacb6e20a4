// Logits of the tokens that a bitmask allows; the others become -inf.
#pragma once

#include <cstring>

#include "logits_row.h"
#include "memory_ops/native/threads.h"

namespace memplus {

// Copies a row; `least` is the code of -inf.
template <class Code>
inline void mask_row(const Code* row, const uint32_t* bits, int64_t size, Code least, Code* out) {
  for (int64_t first = 0; first < size; first += 32, bits++) {
    const int64_t count = std::min<int64_t>(32, size - first);
    if (*bits == UINT32_MAX || !*bits) {
      if (*bits)
        std::memcpy(out + first, row + first, count * sizeof(Code));
      else
        std::fill_n(out + first, count, least);
      continue;
    }
    for (int64_t i = 0; i < count; i++)
      out[first + i] = *bits >> i & 1 ? row[first + i] : least;
  }
}

// Writes `out` [rows, vocab_size]; `bits` [rows, words] has a bit for each token.
inline void mask_logits(const Logits& logits, bool is_bf16, const uint32_t* bits, int64_t words,
                        uint8_t* out) {
  in_parallel(logits.rows, [&](int64_t thread, int64_t threads) {
    const Span own = piece(logits.rows, thread, threads);
    const int64_t size = logits.vocab_size;
    for (int64_t r = own.first; r < own.last; r++)
      is_bf16 ? mask_row<uint16_t>((const uint16_t*)logits.data + r * logits.stride,
                                   bits + r * words, size, 0xff80, (uint16_t*)out + r * size)
              : mask_row<uint32_t>((const uint32_t*)logits.data + r * logits.stride,
                                   bits + r * words, size, 0xff800000, (uint32_t*)out + r * size);
  });
}

}  // namespace memplus
