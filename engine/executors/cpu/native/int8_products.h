// The products of a tile's queries and weights with keys and values in int8 (int8_kv.h).
//
// Queries and keys are spread by a Hadamard matrix, which changes no product of them but its factor.
// Queries are rounded to 15 bits and weights, times the scales of their values, to 16. Each splits
// into two bytes, and the bytes into two rows of an integer product: high * 2^n + low. So integers
// are exact in any order, and the sums of a part are scaled once.
#pragma once

#include <algorithm>
#include <utility>

#include "int8_kv.h"
#include "key_parts.h"
#include "kept.h"
#include "product.h"
#include "transpose.h"
#include "values.h"
#include "weight_groups.h"

namespace memplus {

// The factors of product.h as bytes; the product takes unsigned and signed ones.
struct SignedRows {
  using Sums = ints;
  static ints add_products(ints sum, words row, words line) {
    return add_byte_products(sum, line, row);
  }
};

struct UnsignedRows {
  using Sums = ints;
  static ints add_products(ints sum, words row, words line) {
    return add_byte_products(sum, row, line);
  }
};

// Transposes the four bytes of each word of four vectors.
inline void transpose_bytes(words* vectors) {
  const words a = vectors[0], b = vectors[1], c = vectors[2], d = vectors[3];
  const auto even = [](words x, words y) { return (x & 0x00ff00ff) | (y & 0x00ff00ff) << 8; };
  const auto odd = [](words x, words y) { return (x >> 8 & 0x00ff00ff) | (y & 0xff00ff00); };
  const words first = even(a, b), second = even(c, d), third = odd(a, b), fourth = odd(c, d);
  vectors[0] = (first & 0xffff) | second << 16;
  vectors[1] = (third & 0xffff) | fourth << 16;
  vectors[2] = first >> 16 | (second & 0xffff0000);
  vectors[3] = third >> 16 | (fourth & 0xffff0000);
}

class Int8Products {
 public:
  using Weights = Fp32Values;  // the form in which add_values() takes weights
  using Part = KeyPart<LANES>;

  static int64_t row_bytes(int64_t head_dim) { return Int8KvRow::bytes(head_dim); }

  // Changes the key.
  static void write_key(uint8_t* to, floats* key, int64_t head_dim) {
    spread(key, head_dim);
    Int8KvRow::write(to, key, head_dim);
  }

  static void write_value(uint8_t* to, const floats* value, int64_t head_dim) {
    Int8KvRow::write(to, value, head_dim);
  }

  explicit Int8Products(const Attention& call)
      : head_dim_(call.head_dim),
        key_vectors_((call.head_dim + sizeof(words) - 1) / sizeof(words)),
        out_vectors_(4 * key_vectors_) {
    const int64_t rows = buffer_rows(call), sums = std::max(PART_VECTORS, out_vectors_);
    floats* free = kept_vectors<Int8Products>(2 * rows * (key_vectors_ + sums + 2 + BYTE_VECTORS) +
                                              key_vectors_ + 1 + PART_VECTORS +
                                              key_vectors_ * PART);
    const auto take = [&](int64_t count) { return std::exchange(free, free + count); };
    queries_ = take(2 * rows * key_vectors_);
    sums_ = take(2 * rows * sums);
    starts_ = (int32_t*)take(2 * rows);
    weights_ = (int8_t*)take(2 * rows * BYTE_VECTORS);
    query_scales_ = (float*)take(rows);
    weight_scales_ = (float*)take(rows);
    nothing_ = take(key_vectors_ + 1);
    scales_ = take(PART_VECTORS);
    steps_ = take(key_vectors_ * PART);
    std::fill(nothing_, nothing_ + key_vectors_ + 1, floats{});
  }

  int64_t out_vectors() const { return out_vectors_; }  // vectors per row of sums

  const uint8_t* nothing() const { return (const uint8_t*)nothing_; }  // a row of zeros

  // Keeps a query, which zeros pad to whole vectors, as a row of the tile; changes the query.
  void keep_query(int64_t row, floats* query) {
    spread(query, head_dim_);
    int8_t* to = (int8_t*)(queries_ + 2 * row * key_vectors_);
    const int64_t stride = key_vectors_ * (int64_t)sizeof(words);
    std::memset(to, 0, 2 * stride);
    ints totals[2] = {};
    const float scale =
        round_values(query, head_dim_, QUERY_STEP * 127, [&](int64_t at, int64_t lanes,
                                                             ints integers) {
          const ints high = (integers + QUERY_STEP / 2) >> QUERY_BITS;
          const ints parts[2] = {high, integers - (high << QUERY_BITS)};
          for (int i = 0; i < 2; i++) {
            int8_t bytes[LANES];
            store_i8(bytes, parts[i]);
            std::memcpy(to + i * stride + at, bytes, lanes);
            totals[i] += parts[i];
          }
        });
    query_scales_[row] = scale / spread_block(head_dim_);
    // the product reads 128 more than each key
    for (int i = 0; i < 2; i++) starts_[2 * row + i] = -128 * (int32_t)sum(to_float(totals[i]));
  }

  // Writes the products of queries and keys, PART per row; prefetches the next part's keys.
  void score(const Part& part, const Part& next, floats* scores) {
    read_keys(part, next);
    const int64_t vectors = part.shown() / LANES;
    for (int64_t row = 0; row < 2 * part.rows; row++)
      std::fill_n(sums_ + row * PART_VECTORS, vectors, (floats)splat(starts_[row]));
    add_products<SignedRows>(2 * part.rows, vectors,
                             {(uint8_t*)queries_, key_vectors_ * (int64_t)sizeof(words)},
                             {steps_, PART_VECTORS}, {sums_, PART_VECTORS}, (head_dim_ + 3) / 4);
    for (int64_t row = 0; row < part.rows; row++) {
      const floats *high = sums_ + 2 * row * PART_VECTORS, *low = high + PART_VECTORS;
      for (int64_t v = 0; v < vectors; v++)
        scores[row * PART_VECTORS + v] = joined<QUERY_BITS>(high[v], low[v]) *
                                         (splat(query_scales_[row]) * scales_[v]);
    }
  }

  // Adds the weighted values to the rows of sums; prefetches the next part's values.
  void add_values(const Part& part, const Part& next, const floats* weights, floats* sums) {
    read_values(part, next);
    for (int64_t row = 0; row < part.rows; row++)
      round_weights(weights + row * PART_VECTORS, part.shown(), row);
    std::fill_n(sums_, 2 * part.rows * out_vectors_, floats{});
    add_products<UnsignedRows>(2 * part.rows, out_vectors_, {(uint8_t*)weights_, PART},
                               {steps_, out_vectors_}, {sums_, out_vectors_}, part.shown() / 4);
    for (int64_t row = 0; row < part.rows; row++) {
      const floats *high = sums_ + 2 * row * out_vectors_, *low = high + out_vectors_;
      for (int64_t v = 0; v < out_vectors_; v++)
        sums[row * out_vectors_ + v] += joined<8>(high[v], low[v]) * splat(weight_scales_[row]);
    }
  }

  // Restores the order of values in a row of sums.
  void put_in_order(floats* sums) const {
    for (int64_t first = 0; first < out_vectors_; first += 4) {
      float ordered[4 * LANES];
      for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) ordered[4 * lane + i] = sums[first + i][lane];
      std::memcpy(sums + first, ordered, sizeof ordered);
    }
  }

 private:
  static constexpr int QUERY_BITS = 7;  // of the lower byte
  static constexpr int QUERY_STEP = 1 << QUERY_BITS;
  static constexpr int64_t BYTE_VECTORS = PART / sizeof(words);  // vectors of PART bytes

  template <int BITS>
  static floats joined(floats high, floats low) {
    return to_float((ints)high) * (float)(1 << BITS) + to_float((ints)low);
  }

  // Arranges the part's keys, plus 128, by steps of four values, LANES keys per vector.
  void read_keys(const Part& part, const Part& next) {
    const int64_t ahead = fetched_a_key(part, next);
    for (int64_t at = 0; at < part.shown(); at += LANES) {
      for (int64_t v = 0; v < key_vectors_; v++) {
        words keys[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) keys[i] = read_row(part.keys[at + i], v) ^ 0x80808080;
        transpose(keys);
        floats* to = steps_ + v * LANES * PART_VECTORS + at / LANES;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) to[i * PART_VECTORS] = (floats)keys[i];
      }
      read_scales(part.keys, at, LANES);
      fetch(next.keys, next, at * ahead, (at + LANES) * ahead);
    }
  }

  // Arranges the part's values by steps of four keys. Lane l of vector 4 v + i of a step holds value
  // 4 (v LANES + l) + i.
  void read_values(const Part& part, const Part& next) {
    const int64_t ahead = fetched_a_key(part, next);
    for (int64_t at = 0; at < part.shown(); at += 4) {
      floats* to = steps_ + at / 4 * out_vectors_;
      for (int64_t v = 0; v < key_vectors_; v++) {
        words values[4];
        for (int i = 0; i < 4; i++) values[i] = read_row(part.values[at + i], v);
        transpose_bytes(values);
        for (int i = 0; i < 4; i++) to[4 * v + i] = (floats)values[i];
      }
      read_scales(part.values, at, 4);
      fetch(next.values, next, at * ahead, (at + 4) * ahead);
    }
  }

  words read_row(const uint8_t* row, int64_t vector) const {
    const int64_t first = vector * sizeof(words);
    return read_words(row + first, head_dim_ - first);
  }

  void read_scales(const uint8_t* const* rows, int64_t first, int64_t count) {
    for (int64_t at = first; at < first + count; at++)
      ((float*)scales_)[at] = Int8KvRow::scale(rows[at], head_dim_);
  }

  void fetch(const uint8_t* const* rows, const Part& next, int64_t first, int64_t last) const {
    fetch_rows(rows, next.count, first, last, row_bytes(head_dim_));
  }

  // Rounds a row of weights, times the scales of their values.
  void round_weights(const floats* weights, int64_t count, int64_t row) {
    floats scaled[PART_VECTORS];
    for (int64_t v = 0; v < count / LANES; v++) scaled[v] = weights[v] * scales_[v];
    int8_t *high = weights_ + 2 * row * PART, *low = high + PART;
    weight_scales_[row] =
        round_values(scaled, count, 0xffff, [&](int64_t at, int64_t, ints integers) {
          store_i8(high + at, integers >> 8);
          store_i8(low + at, integers);
        });
  }

  const int64_t head_dim_, key_vectors_, out_vectors_;  // vectors per row of keys, and of sums
  floats *queries_, *sums_;  // two rows of bytes, and of integers, per row of the tile
  int32_t* starts_;          // of the sums of scores
  int8_t* weights_;          // two rows of PART bytes per row of the tile
  float *query_scales_, *weight_scales_;
  floats* nothing_;
  floats* scales_;  // of the part's keys, then of its values
  floats* steps_;   // the part's keys, then its values, in the layout of products
};

}  // namespace memplus
