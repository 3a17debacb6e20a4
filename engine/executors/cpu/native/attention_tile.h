// Attention of the rows of one tile, each a query of one head, over the keys that they share.
//
// Keys are processed in order, in parts of PART, with an online softmax (arXiv 2205.14135). So the
// result of a query depends neither on the other queries of its batch nor on how its prompt was
// split: keys that it must not see get a weight of exactly 0.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_call.h"
#include "kept.h"
#include "key_parts.h"
#include "key_tiles.h"
#include "matrix_tiles.h"
#include "memory_ops/native/simd.h"
#include "product_tiles.h"
#include "rope.h"
#include "transpose.h"
#include "values.h"

namespace memplus {

constexpr int64_t PART_VECTORS = PART / LANES;

// The state of one thread; its buffers are reused between calls.
template <class Values>
class TileWorker {
 public:
  explicit TileWorker(const Attention& call)
      : call_(call),
        key_vectors_((call.head_dim * bytes + sizeof(words) - 1) / sizeof(words)),
        out_vectors_((call.head_dim + LANES - 1) / LANES),
        in_pairs_(Values::has_pairs && call.head_dim % (2 * LANES) == 0) {
    const int64_t rows = rounded_up(call.tile_queries() * call.group_heads(), TILE_HEIGHT);
    const int64_t steps =
        std::max(key_vectors_ * LANES * PART_VECTORS, PART / STEP_KEYS * out_vectors_);
    floats* free =
        kept_vectors<TileWorker>(rows * (key_vectors_ + out_vectors_ + 2 + PART_VECTORS) +
                                 out_vectors_ + key_vectors_ * (1 + LANES) + steps);
    const auto take = [&](int64_t count) { return std::exchange(free, free + count); };
    queries_ = take(rows * key_vectors_);
    sums_ = take(rows * out_vectors_);
    totals_ = take(rows);
    scores_ = take(rows * PART_VECTORS);
    rotated_ = take(out_vectors_);
    nothing_ = take(key_vectors_);
    turned_ = take(key_vectors_ * LANES);
    steps_ = take(steps);
    largest_ = (float*)take(rows);
    std::fill(nothing_, nothing_ + key_vectors_, floats{});
  }

  // Computes the tiles that `take` returns until it returns null.
  template <class Take>
  void run(Take take) {
    Part *now = &parts_[0], *next = &parts_[1];
    [[maybe_unused]] const UseOfTiles use;
    for (find(*now, take(), 0); now->tile; std::swap(now, next)) {
      // prefetch the next part while this part is computed
      const bool is_last = now->first + PART >= now->seen;
      find(*next, is_last ? take() : now->tile, is_last ? 0 : now->first + PART);
      if (now->first == 0) read_queries(*now);
      if (is_one_tile(*now)) {
        score_in_place(*now, *next);
      } else {
        read_keys(*now, *next);
        score(*now);
      }
      mask(*now);
      for (int64_t row = 0; row < now->rows; row++) weigh(row, now->shown());
      read_values(*now, *next);
      add_products<Values>(now->rows, out_vectors_, {(uint8_t*)scores_, PART * 4},
                           {steps_, out_vectors_}, {sums_, out_vectors_},
                           now->shown() / STEP_KEYS);
      call_.progress.mark();
      if (is_last)
        for (int64_t row = 0; row < now->rows; row++) write(*now->tile, row);
    }
  }

 private:
  static constexpr int64_t bytes = Values::bytes;
  static constexpr int64_t STEP_KEYS = 4 / bytes;  // keys whose values one step of a product adds
  // whole vectors of keys, and whole tiles of steps
  using Part = KeyPart<std::max<int64_t>(LANES, STEP_KEYS * TILE_STEPS)>;

  int64_t head_bytes() const { return call_.head_dim * bytes; }

  int64_t head(const QueryTile& tile, int64_t row) const {
    return tile.kv_head * call_.group_heads() + row % call_.group_heads();
  }

  int64_t token(const QueryTile& tile, int64_t row) const {
    return call_.query_starts[tile.sequence] + tile.first + row / call_.group_heads();
  }

  // Whether keys are scored in place; see key_tiles.h.
  bool is_one_tile([[maybe_unused]] const Part& part) const {
#if defined(__AMX_BF16__)
    return bytes == 2 && part.rows <= TILE_HEIGHT && call_.block_size % TILE_KEYS == 0 &&
           call_.head_dim * bytes % sizeof(floats) == 0;
#else
    return false;
#endif
  }

  void read_queries(const Part& part) {
    for (int64_t row = 0; row < part.rows; row++) read_query(*part.tile, row);
#if defined(__AMX_BF16__)
    if (is_one_tile(part)) turn_queries(queries_, part.rows, key_vectors_, turned_);
#endif
  }

  void read_query(const QueryTile& tile, int64_t row) {
    const int64_t token = this->token(tile, row);
    const uint8_t* query = call_.qkv + call_.qkv_place(token, head(tile, row)) * bytes;
    by_vectors(call_.head_dim, [&](int64_t v, int64_t at, int64_t lanes) {
      rotated_[v] = Values::read(query + at * bytes, lanes);
    });
    const int64_t half = call_.head_dim / 2;
    rotate((float*)rotated_, call_.cosines + token * half, call_.sines + token * half, half);
    uint8_t* to = (uint8_t*)(queries_ + row * key_vectors_);
    std::memset(to, 0, key_vectors_ * sizeof(floats));
    Values::write(to, rotated_, call_.head_dim);
    std::fill(sums_ + row * out_vectors_, sums_ + (row + 1) * out_vectors_, floats{});
    totals_[row] = floats{};
    largest_[row] = -std::numeric_limits<float>::infinity();
  }

  void find(Part& part, const QueryTile* tile, int64_t first) const {
    part.tile = tile, part.first = first, part.count = 0;
    if (tile) {
      const int64_t s = tile->sequence;
      part.before = call_.context_lengths[s] - (call_.query_starts[s + 1] - call_.query_starts[s]);
      part.seen = part.before + tile->last;
      part.rows = (tile->last - tile->first) * call_.group_heads();
      part.count = std::min(PART, part.seen - first);
    }
    const int64_t size = call_.head_dim * bytes, half = call_.kv_half() * bytes;
    for (int64_t at = 0; at < part.count;) {
      const int64_t position = first + at, left = call_.block_size - position % call_.block_size;
      const int64_t end = std::min(part.count, at + left);
      const int64_t place = call_.kv_place(tile->sequence, tile->kv_head, position);
      for (const uint8_t* key = call_.kv + place * bytes; at < end; at++, key += size)
        part.keys[at] = key, part.values[at] = key + half;
    }
    for (int64_t at = part.count; at < part.shown(); at++)
      part.keys[at] = part.values[at] = (uint8_t*)nothing_;
  }

  // Arranges the part's keys by steps over their values, LANES keys per vector.
  void read_keys(const Part& part, const Part& next) {
    const int64_t size = call_.head_dim * bytes, ahead = fetched_a_key(part, next);
    for (int64_t at = 0; at < part.shown(); at += LANES) {
      for (int64_t v = 0; v < key_vectors_; v++) {
        words keys[LANES];
        const int64_t first = v * sizeof(words);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
          keys[i] = read_words(part.keys[at + i] + first, size - first);
        transpose(keys);
        floats* to = steps_ + v * LANES * PART_VECTORS + at / LANES;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) to[i * PART_VECTORS] = (floats)keys[i];
      }
      fetch_rows(next.keys, next.count, at * ahead, (at + LANES) * ahead, head_bytes());
    }
  }

  static words read_words(const uint8_t* at, int64_t left) {
    if (left >= (int64_t)sizeof(words)) return load<words>(at);
    words last{};
    std::memcpy(&last, at, left);
    return last;
  }

  void score_in_place([[maybe_unused]] const Part& part, [[maybe_unused]] const Part& next) {
#if defined(__AMX_BF16__)
    const int64_t ahead = fetched_a_key(part, next);
    for (int64_t at = 0; at < part.count; at += TILE_KEYS) {
      words sums[LANES];
      score_keys(part.keys[at], key_vectors_, turned_, sums);
      for (int64_t row = 0; row < part.rows; row++)
        scores_[row * PART_VECTORS + at / LANES] = (floats)sums[row];
      fetch_rows(next.keys, next.count, at * ahead, (at + TILE_KEYS) * ahead, head_bytes());
    }
#endif
  }

  void score(const Part& part) {
    const int64_t rows = part.rows;
    std::fill(scores_, scores_ + rows * PART_VECTORS, floats{});
    add_products<Values>(rows, part.shown() / LANES,
                         {(uint8_t*)queries_, key_vectors_ * (int64_t)sizeof(words)},
                         {steps_, PART_VECTORS}, {scores_, PART_VECTORS},
                         rounded_up((call_.head_dim + STEP_KEYS - 1) / STEP_KEYS, TILE_STEPS));
  }

  // Scales the scores of the part's keys; keys that a row must not see get minus infinity.
  void mask(const Part& part) {
    const int64_t vectors = part.shown() / LANES, rows = part.rows;
    const floats scale = splat(1.f / __builtin_sqrtf((float)call_.head_dim));
    const floats unseen = splat(-std::numeric_limits<float>::infinity());
    for (int64_t row = 0; row < rows; row++) {
      const int64_t position = part.before + part.tile->first + row / call_.group_heads();
      const int64_t seen = std::min(position + 1 - part.first, PART);
      floats* scores = scores_ + row * PART_VECTORS;
      for (int64_t v = 0; v < vectors; v++) {
        const ints limit = splat((int32_t)(seen - v * LANES));
        scores[v] = lane_numbers() < limit ? scores[v] * scale : unseen;
      }
    }
  }

  // Converts a row's scores to weights in place, as Values; rescales sums to a new largest score.
  void weigh(int64_t row, int64_t count) {
    floats* scores = scores_ + row * PART_VECTORS;
    floats most = scores[0];
    for (int64_t v = 1; v * LANES < count; v++) most = scores[v] > most ? scores[v] : most;
    const float before = largest_[row], now = std::max(before, largest(most));
    if (now > before) {
      const floats factor = exp_negative(splat(before - now));
      totals_[row] *= factor;
      for (int64_t v = 0; v < out_vectors_; v++) sums_[row * out_vectors_ + v] *= factor;
      largest_[row] = now;
    }
    uint8_t* to = (uint8_t*)scores;
    for (int64_t v = 0; v * LANES < count; v++) {
      const floats weights = Values::rounded(exp_negative(scores[v] - splat(now)));
      totals_[row] += weights;
      Values::narrow(to + v * LANES * bytes, weights);
    }
  }

  // Arranges the part's values by steps; missing values are 0, since a weight of 0 would not cancel
  // a NaN.
  void read_values(const Part& part, const Part& next) {
    const int64_t ahead = fetched_a_key(part, next);
    for (int64_t at = 0; at < part.shown(); at += STEP_KEYS) {
      floats* to = steps_ + at / STEP_KEYS * out_vectors_;
      if constexpr (Values::has_pairs) {
        if (in_pairs_) {
          for (int64_t v = 0; v < out_vectors_; v += 2)
            Values::pair(part.values[at] + v * LANES * bytes,
                         part.values[at + 1] + v * LANES * bytes, to + v);
          fetch_rows(next.values, next.count, at * ahead, (at + STEP_KEYS) * ahead, head_bytes());
          continue;
        }
      }
      by_vectors(call_.head_dim, [&](int64_t v, int64_t e, int64_t lanes) {
        to[v] = (floats)Values::together(part.values + at, e, lanes);
      });
      fetch_rows(next.values, next.count, at * ahead, (at + STEP_KEYS) * ahead, head_bytes());
    }
  }

  void write(const QueryTile& tile, int64_t row) {
    const int64_t at = (token(tile, row) * call_.num_heads + head(tile, row)) * call_.head_dim;
    const floats factor = splat(1.f / sum(totals_[row]));
    floats* sums = sums_ + row * out_vectors_;
    for (int64_t v = 0; v < out_vectors_; v++) sums[v] *= factor;
    if constexpr (Values::has_pairs)
      for (int64_t v = 0; in_pairs_ && v < out_vectors_; v += 2) Values::in_order(sums + v);
    Values::write(call_.out + at * bytes, sums, call_.head_dim);
  }

  const Attention& call_;
  const int64_t key_vectors_, out_vectors_;  // vectors per row of keys, and of fp32 values
  const bool in_pairs_;                      // see Values::pair()
  floats *queries_, *sums_, *totals_, *scores_;  // per row
  floats *rotated_, *nothing_, *turned_;
  floats* steps_;  // the part's keys, then its values, in the layout of products
  float* largest_;
  Part parts_[2];
};

}  // namespace memplus
