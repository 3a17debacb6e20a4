// The products of a tile's queries and weights with keys and values in the dtype of the model.
#pragma once

#include <algorithm>
#include <utility>

#include "key_parts.h"
#include "kept.h"
#include "key_tiles.h"
#include "product_tiles.h"
#include "transpose.h"
#include "values.h"

namespace memplus {

template <class Values>
class ValueProducts {
  static constexpr int64_t bytes = Values::bytes;
  static constexpr int64_t STEP_KEYS = 4 / bytes;  // keys whose values one step of a product adds

 public:
  using Weights = Values;  // the form in which add_values() takes weights
  // whole vectors of keys, and whole tiles of steps
  using Part = KeyPart<std::max<int64_t>(LANES, STEP_KEYS * TILE_STEPS)>;

  static int64_t row_bytes(int64_t head_dim) { return head_dim * bytes; }

  static void write_key(uint8_t* to, const floats* key, int64_t head_dim) {
    Values::write(to, key, head_dim);
  }

  static void write_value(uint8_t* to, const floats* value, int64_t head_dim) {
    Values::write(to, value, head_dim);
  }

  explicit ValueProducts(const Attention& call)
      : call_(call),
        key_vectors_((row_bytes(call.head_dim) + sizeof(words) - 1) / sizeof(words)),
        out_vectors_((call.head_dim + LANES - 1) / LANES),
        in_pairs_(Values::has_pairs && call.head_dim % (2 * LANES) == 0) {
    const int64_t rows = buffer_rows(call);
    const int64_t steps =
        std::max(key_vectors_ * LANES * PART_VECTORS, PART / STEP_KEYS * out_vectors_);
    floats* free = kept_vectors<ValueProducts>((rows + 1 + LANES) * key_vectors_ + steps);
    const auto take = [&](int64_t count) { return std::exchange(free, free + count); };
    queries_ = take(rows * key_vectors_);
    nothing_ = take(key_vectors_);
    turned_ = take(key_vectors_ * LANES);
    steps_ = take(steps);
    std::fill(nothing_, nothing_ + key_vectors_, floats{});
  }

  int64_t out_vectors() const { return out_vectors_; }  // vectors per row of sums

  const uint8_t* nothing() const { return (const uint8_t*)nothing_; }  // a row of zeros

  // Keeps a query, which zeros pad to whole vectors, as a row of the tile.
  void keep_query(int64_t row, const floats* query) {
    uint8_t* to = (uint8_t*)(queries_ + row * key_vectors_);
    std::memset(to, 0, key_vectors_ * sizeof(floats));
    Values::write(to, query, call_.head_dim);
  }

  // Writes the products of queries and keys, PART per row; prefetches the next part's keys.
  void score(const Part& part, const Part& next, floats* scores) {
    if (is_one_tile(part)) return score_in_place(part, next, scores);
    read_keys(part, next);
    std::fill(scores, scores + part.rows * PART_VECTORS, floats{});
    add_products<Values>(part.rows, part.shown() / LANES,
                         {(uint8_t*)queries_, key_vectors_ * (int64_t)sizeof(words)},
                         {steps_, PART_VECTORS}, {scores, PART_VECTORS},
                         rounded_up((call_.head_dim + STEP_KEYS - 1) / STEP_KEYS, TILE_STEPS));
  }

  // Adds the weighted values to the rows of sums; prefetches the next part's values.
  void add_values(const Part& part, const Part& next, const floats* weights, floats* sums) {
    read_values(part, next);
    add_products<Values>(part.rows, out_vectors_, {(const uint8_t*)weights, PART * 4},
                         {steps_, out_vectors_}, {sums, out_vectors_}, part.shown() / STEP_KEYS);
  }

  // Restores the order of values in a row of sums.
  void put_in_order(floats* sums) const {
    if constexpr (Values::has_pairs)
      for (int64_t v = 0; in_pairs_ && v < out_vectors_; v += 2) Values::in_order(sums + v);
  }

 private:
  // Whether keys are scored in place; see key_tiles.h.
  bool is_one_tile([[maybe_unused]] const Part& part) const {
#if defined(__AMX_BF16__)
    return bytes == 2 && part.rows <= TILE_HEIGHT && call_.block_size % TILE_KEYS == 0 &&
           row_bytes(call_.head_dim) % sizeof(floats) == 0;
#else
    return false;
#endif
  }

  void score_in_place([[maybe_unused]] const Part& part, [[maybe_unused]] const Part& next,
                      [[maybe_unused]] floats* scores) {
#if defined(__AMX_BF16__)
    const int64_t ahead = fetched_a_key(part, next);
    if (part.first == 0) turn_queries(queries_, part.rows, key_vectors_, turned_);
    for (int64_t at = 0; at < part.count; at += TILE_KEYS) {
      words sums[LANES];
      score_keys(part.keys[at], key_vectors_, turned_, sums);
      for (int64_t row = 0; row < part.rows; row++)
        scores[row * PART_VECTORS + at / LANES] = (floats)sums[row];
      fetch(next.keys, next, at * ahead, (at + TILE_KEYS) * ahead);
    }
#endif
  }

  void fetch(const uint8_t* const* rows, const Part& next, int64_t first, int64_t last) const {
    fetch_rows(rows, next.count, first, last, row_bytes(call_.head_dim));
  }

  // Arranges the part's keys by steps over their values, LANES keys per vector.
  void read_keys(const Part& part, const Part& next) {
    const int64_t size = row_bytes(call_.head_dim), ahead = fetched_a_key(part, next);
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
      fetch(next.keys, next, at * ahead, (at + LANES) * ahead);
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
          fetch(next.values, next, at * ahead, (at + STEP_KEYS) * ahead);
          continue;
        }
      }
      by_vectors(call_.head_dim, [&](int64_t v, int64_t e, int64_t lanes) {
        to[v] = (floats)Values::together(part.values + at, e, lanes);
      });
      fetch(next.values, next, at * ahead, (at + STEP_KEYS) * ahead);
    }
  }

  const Attention& call_;
  const int64_t key_vectors_, out_vectors_;  // vectors per row of keys, and of fp32 values
  const bool in_pairs_;                      // see Values::pair()
  floats *queries_, *nothing_, *turned_;
  floats* steps_;  // the part's keys, then its values, in the layout of products
};

}  // namespace memplus
