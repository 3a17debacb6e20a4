// The C interface, compiled once for each instruction set; library.py calls it.
#pragma once

#include "attention.h"

// Writes `out` [T, H, E]; the fields are those of memplus::Attention. Blocks and lengths are the
// engine's own, and are not checked.
extern "C" void memplus_attention(const uint8_t* q, const uint8_t* kv, const int64_t* block_table,
                                  const int64_t* query_starts, const int64_t* context_lengths,
                                  uint8_t* out, int64_t num_sequences, int64_t table_width,
                                  int64_t q_stride, int64_t num_heads, int64_t num_kv_heads,
                                  int64_t head_dim, int64_t block_size, int32_t is_bf16) {
  const memplus::Attention call = {
      q,           kv,       block_table, query_starts, context_lengths, out,       num_sequences,
      table_width, q_stride, num_heads,   num_kv_heads, head_dim,        block_size};
  is_bf16 ? memplus::attend<memplus::Bf16Values>(call) : memplus::attend<memplus::Fp32Values>(call);
}
