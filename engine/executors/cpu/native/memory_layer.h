// A memory layer, run by a team of threads, whose value rows are in memory or are fetched into it:
//
//   rows, w = product top-K of (subkeys . query(x));   m = sum w * (table[row] + patches[row])
//   x += values(scale * silu(gate(x)) * m), or values(scale * m) without a gate
#pragma once

#include "linear.h"
#include "memory_ops/native/gather_rows.h"
#include "memory_ops/native/product_topk.h"
#include "memory_ops/native/row_fetcher.h"
#include "memory_ops/native/row_patches.h"

namespace memplus {

// Tokens whose half scores are computed at a time: parts of long prompts fit the caches.
constexpr int64_t CHOOSING_TOKENS = 64;
constexpr int64_t GATHERED_TOKENS = 16;

// H heads, N subkeys per half, K rows per head, V values per row; `gate` may be null. With a
// `fetcher`, `table` is the memory that it fetches rows into, indexed by slots instead of rows.
struct MemoryLayer {
  const PackedLinear *query, *subkeys, *gate, *values;
  Table table;
  const RowFetcher* fetcher;
  int64_t top_k;
  float scale;

  int64_t heads() const { return subkeys->blocks / 2; }
  int64_t num_subkeys() const { return subkeys->outputs; }
  int64_t token_scores() const { return heads() * 2 * num_subkeys(); }
  int64_t token_rows() const { return heads() * top_k; }
};

// The rows chosen for each token, and their weights, [T, H, K]; `patches` may be null.
struct ChosenRows {
  int64_t* rows;
  float* weights;
  const TokenPatches* patches;
};

// Buffers between the layer's parts.
struct MemoryRoom {
  uint8_t *queries, *gates, *gated;
  float *scores, *sums;
  int64_t* slots;
};

// Chooses one thread's share of the rows of tokens [tokens.first, tokens.last) from their scores.
inline void choose_share(const MemoryLayer& memory, const float* scores, Span tokens,
                         ChosenRows chosen, int64_t thread, int64_t threads) {
  const Span heads = piece((tokens.last - tokens.first) * memory.heads(), thread, threads);
  const int64_t at = tokens.first * memory.token_rows();
  if (heads.first < heads.last)
    product_topk(scores, heads, (int)memory.num_subkeys(), (int)memory.top_k, chosen.rows + at,
                 chosen.weights + at);
}

// Gates some columns of the sums; the token's sums begin at `place`.
template <class Values>
inline void gate_sums(const MemoryLayer& memory, const MemoryRoom& room, int64_t place,
                      Span columns) {
  by_vectors(columns.last - columns.first, [&](int64_t, int64_t at, int64_t lanes) {
    at += place + columns.first;
    floats value = memory.scale * Fp32Values::read((const uint8_t*)(room.sums + at), lanes);
    if (memory.gate) value *= silu(Values::read(room.gates + at * Values::bytes, lanes));
    Values::write(room.gated + at * Values::bytes, value, lanes);
  });
}

// Computes one thread's share of room.gated [T, V] from rows and gates. `places` [T, H, K] has the
// places of the chosen rows in the layer's table.
template <class Values>
inline void gather_share(const MemoryLayer& memory, ChosenRows chosen, const int64_t* places,
                         MemoryRoom room, Span tokens, Progress progress, int64_t thread,
                         int64_t threads) {
  const SumsPart own = sums_part(memory.table, tokens.last - tokens.first, thread, threads);
  const int64_t choices = tokens.first * memory.token_rows();
  const int64_t values = tokens.first * memory.table.value_dim;
  room.sums += values, room.gates += values * Values::bytes, room.gated += values * Values::bytes;
  const Sums sums = {places + choices, chosen.weights + choices, nullptr, memory.token_rows(),
                     room.sums};
  const Sums changes = {chosen.rows + choices, sums.weights, nullptr, sums.per_sum, sums.out};
  // few values at a time, so that their sums stay in the caches
  for (int64_t first = own.sums.first; first < own.sums.last; first += GATHERED_TOKENS) {
    const Span some = {first, std::min(first + GATHERED_TOKENS, own.sums.last)};
    gather_rows(memory.table, sums, SumsPart{some, own.columns});
    if (chosen.patches)
      add_patches(chosen.patches->from(tokens.first), changes, memory.table.value_dim,
                  {some, own.columns});
    for (int64_t token = some.first; token < some.last; token++)
      gate_sums<Values>(memory, room, token * memory.table.value_dim, own.columns);
    progress.mark();
  }
}

}  // namespace memplus
