// Row patches: sums of rows get what the patches of a token add to the rows that it reads.
//
//   out[t] += sum over the patches of t, over c: scale * weights[t, c] * delta[ids[t, c]]
//
// Only tokens with patches cost time: each of their ids is looked up in each patch's hash index.
#pragma once

#include "gather_rows.h"

namespace memplus {

// One table's part of a patch; see memory_ops/patches/patched_rows.py.
struct Patch {
  Table deltas;          // [P, V]
  const int64_t* rows;   // [P], ascending
  const int32_t* index;  // 2^index_bits places: a row's number or -1
  int64_t index_bits, factor;
  int64_t* counts;  // row reads by tokens that use the patch, and those that found a row

  int64_t home(int64_t row) const {
    return (int64_t)((uint64_t)row * (uint64_t)factor >> (64 - index_bits));
  }

  // The number of a row, or -1.
  int64_t find(int64_t row) const {
    const int64_t mask = (int64_t{1} << index_bits) - 1;
    for (int64_t place = home(row);; place = (place + 1) & mask) {
      const int32_t number = index[place];
      if (number < 0 || rows[number] == row) return number;
    }
  }
};

struct PatchUse {
  const Patch* patch;
  float scale;
};

// The patches of a lookup's tokens.
struct TokenPatches {
  const int32_t* sets;    // each token's set, or -1
  const int64_t* starts;  // set s has the uses [starts[s], starts[s + 1])
  const PatchUse* uses;

  // those of the tokens from `token` on
  TokenPatches from(int64_t token) const { return {sets + token, starts, uses}; }
};

// Adds rows to some columns of the sums of one token.
inline void add_deltas(const Table& deltas, const Sums& sums, Span columns) {
  if (deltas.format == BF16)
    gather_part<Bf16Row, Schedule<Bf16Row>, true>(deltas, sums, {0, 1}, columns);
  else
    gather_part<Fp32Row, Schedule<Fp32Row>, true>(deltas, sums, {0, 1}, columns);
}

constexpr int64_t FOUND_ROWS = 128;  // found rows that are added at a time

// Adds some columns of the deltas of a token's rows to its sums, `out` [V], and counts the rows.
inline void add_patch(const PatchUse& use, const int64_t* ids, const float* weights, int64_t count,
                      Span columns, float* out) {
  const Patch& patch = *use.patch;
  int64_t found[FOUND_ROWS];
  float found_weights[FOUND_ROWS];
  int64_t hits = 0;
  for (int64_t first = 0; first < count; first += FOUND_ROWS) {
    int64_t size = 0;
    for (int64_t i = first; i < std::min(first + FOUND_ROWS, count); i++)
      if (const int64_t number = patch.find(ids[i]); number >= 0) {
        found[size] = number;
        found_weights[size++] = weights[i] * use.scale;
      }
    if (size) add_deltas(patch.deltas, {found, found_weights, nullptr, size, out}, columns);
    hits += size;
  }
  // one of the threads that share a token's columns counts
  if (columns.first == 0) {
    __atomic_fetch_add(&patch.counts[0], count, __ATOMIC_RELAXED);
    __atomic_fetch_add(&patch.counts[1], hits, __ATOMIC_RELAXED);
  }
}

// Adds to the sums of some tokens and columns. `sums` has the table's row ids.
inline void add_patches(const TokenPatches& patches, const Sums& sums, int64_t value_dim,
                        SumsPart part) {
  // more threads than steps of columns: some get none, and several of these begin at 0
  if (part.columns.first >= part.columns.last) return;
  for (int64_t token = part.sums.first; token < part.sums.last; token++) {
    const int32_t set = patches.sets[token];
    if (set < 0) continue;
    const int64_t first = sums.start(token);
    for (int64_t i = patches.starts[set]; i < patches.starts[set + 1]; i++)
      add_patch(patches.uses[i], sums.ids + first, sums.weights + first, sums.per_sum,
                part.columns, sums.out + token * value_dim);
  }
}

inline void add_patched_rows(const TokenPatches& patches, const Sums& sums, int64_t num_sums,
                             int64_t value_dim) {
  in_parallel(num_sums, [&](int64_t thread, int64_t threads) {
    add_patches(patches, sums, value_dim, {piece(num_sums, thread, threads), {0, value_dim}});
  });
}

}  // namespace memplus
