// The products of a tile's queries and weights with keys and values in int8.
//
// Queries and keys are spread by a Hadamard matrix, which multiplies every product by the same factor.
// Queries are rounded to 15 bits and weights, times the scales of their values, to 16. Each splits
// into two bytes, and the bytes into two rows of an integer product: high * 2^n + low. So integers
// are exact in any order, and the sums of a part are scaled once.
#pragma once

#include <algorithm>
#include <utility>

#include "byte_products.h"
#include "kept.h"
#include "part_lines.h"
#include "rounded_rows.h"
#include "values.h"

namespace memplus {

// The factors of product.h as bytes; the product takes unsigned and signed ones, and its sums are the
// bits of integers.
struct SignedRows {
  static floats add_products(floats sum, words row, words line) {
    return (floats)add_byte_products((ints)sum, line, row);
  }
};

struct UnsignedRows {
  static floats add_products(floats sum, words row, words line) {
    return (floats)add_byte_products((ints)sum, row, line);
  }
};

class Int8Products {
  using Lines = PartLines<1, 1>;

 public:
  using Weights = Fp32Values;  // the form in which add_values() takes weights
  using Areas = KvAreas<1>;
  using Part = Lines::Part;

  explicit Int8Products(const Attention& call)
      : head_dim_(call.head_dim), areas_(call), lines_(call), out_vectors_(lines_.out_vectors()),
        query_bytes_(rounded_up(call.head_dim, sizeof(words))) {
    const int64_t rows = 2 * buffer_rows(call), sums = std::max(PART_VECTORS, out_vectors_);
    uint8_t* free = kept_bytes<Int8Products>(rows * (query_bytes_ + sums * sizeof(floats) + PART +
                                                     2 * WORD));
    const auto take = [&](int64_t bytes) { return std::exchange(free, free + bytes); };
    sums_ = (floats*)take(rows * sums * sizeof(floats));
    queries_ = (int8_t*)take(rows * query_bytes_);
    weights_ = (int8_t*)take(rows * PART);
    starts_ = (int32_t*)take(rows * WORD);
    query_scales_ = (float*)take(rows / 2 * WORD);
    weight_scales_ = (float*)take(rows / 2 * WORD);
  }

  int64_t out_vectors() const { return out_vectors_; }  // per row of sums

  // Rounds and writes the key and the value of one token, in fp32, and changes the key.
  static void write(const Areas& areas, uint8_t* area, int64_t token, floats* key, floats* value) {
    spread(key, areas.head_dim);
    uint8_t* first = areas.key(area, token);
    // keys are unsigned, with an offset of 128
    const float key_scale = round_in_place(key, areas.head_dim, 0x80);
    const float value_scale = round_in_place(value, areas.head_dim, 0);
    areas.write(area, token, (uint8_t*)key, (uint8_t*)value);
    store(first + areas.key_scale_at(), key_scale);
    store(first + areas.value_scale_at(), value_scale);
  }

  // Keeps a query as a row of the tile, and changes it.
  void keep_query(int64_t row, floats* query) {
    spread(query, head_dim_);
    int8_t* to = queries_ + 2 * row * query_bytes_;
    ints totals[2] = {};
    const float scale =
        round_values(query, head_dim_, QUERY_STEP * 127, [&](int64_t at, int64_t lanes,
                                                             ints integers) {
          const ints high = (integers + QUERY_STEP / 2) >> QUERY_BITS;
          const ints parts[2] = {high, integers - (high << QUERY_BITS)};
          for (int i = 0; i < 2; i++) {
            int8_t bytes[LANES];
            store_i8(bytes, parts[i]);
            std::memcpy(to + i * query_bytes_ + at, bytes, lanes);
            totals[i] += parts[i];
          }
        });
    query_scales_[row] = scale / spread_block(head_dim_);
    // the product reads 128 more than each key
    for (int i = 0; i < 2; i++) starts_[2 * row + i] = -128 * (int32_t)sum(to_float(totals[i]));
  }

  // Writes the products of queries and keys, PART per row; prefetches the next part's keys.
  void score(const Part& part, const Part& next, floats* scores) {
    const int64_t vectors = part.shown() / LANES;
    read_scales(part, areas_.key_scale_at());
    for (int64_t row = 0; row < 2 * part.rows; row++)
      std::fill_n(sums_ + row * PART_VECTORS, vectors, (floats)splat(starts_[row]));
    add_products<SignedRows>(2 * part.rows, vectors, {(uint8_t*)queries_, query_bytes_},
                             lines_.keys(part, next), {sums_, PART_VECTORS}, lines_.key_steps());
    for (int64_t row = 0; row < part.rows; row++) {
      const floats *high = sums_ + 2 * row * PART_VECTORS, *low = high + PART_VECTORS;
      for (int64_t v = 0; v < vectors; v++)
        scores[row * PART_VECTORS + v] = joined<QUERY_BITS>(high[v], low[v]) *
                                         (splat(query_scales_[row]) * scales_[v]);
    }
  }

  // Adds the weighted values to the rows of sums; prefetches the next part's values.
  void add_values(const Part& part, const Part& next, const floats* weights, floats* sums) {
    read_scales(part, areas_.value_scale_at());
    for (int64_t row = 0; row < part.rows; row++)
      round_weights(weights + row * PART_VECTORS, part.shown(), row);
    std::fill_n(sums_, 2 * part.rows * out_vectors_, floats{});
    add_products<UnsignedRows>(2 * part.rows, out_vectors_, {(uint8_t*)weights_, PART},
                               lines_.values(part, next), {sums_, out_vectors_},
                               part.shown() / Areas::LINE_TOKENS);
    for (int64_t row = 0; row < part.rows; row++) {
      const floats *high = sums_ + 2 * row * out_vectors_, *low = high + out_vectors_;
      for (int64_t v = 0; v < out_vectors_; v++)
        sums[row * out_vectors_ + v] += joined<8>(high[v], low[v]) * splat(weight_scales_[row]);
    }
  }

 private:
  static constexpr int QUERY_BITS = 7;  // of the lower byte
  static constexpr int QUERY_STEP = 1 << QUERY_BITS;

  template <int BITS>
  static floats joined(floats high, floats low) {
    return to_float((ints)high) * (float)(1 << BITS) + to_float((ints)low);
  }

  // Rounds numbers to the first bytes of their own memory; returns the scale.
  static float round_in_place(floats* numbers, int64_t count, uint8_t offset) {
    uint8_t* to = (uint8_t*)numbers;
    return round_values(numbers, count, 127, [&](int64_t at, int64_t lanes, ints integers) {
      int8_t rounded[LANES];
      store_i8(rounded, integers ^ offset);
      std::memcpy(to + at, rounded, lanes);
    });
  }

  // Reads the scales of the part's keys or values. Missing ones are 0, since their weights would not
  // cancel a NaN.
  void read_scales(const Part& part, int64_t scale_at) {
    float* scales = (float*)scales_;
    for (int64_t at = 0; at < part.count; at += QUAD)
      std::memcpy(scales + at, part.keys[at / QUAD] + scale_at, QUAD * WORD);
    std::fill(scales + part.count, scales + part.shown(), 0.f);
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

  const int64_t head_dim_;
  const Areas areas_;
  Lines lines_;
  const int64_t out_vectors_, query_bytes_;
  floats* sums_;                // of integers, two rows per row of the tile
  int8_t *queries_, *weights_;  // two rows of bytes per row of the tile
  int32_t* starts_;             // of the sums of scores
  float *query_scales_, *weight_scales_;
  floats scales_[PART_VECTORS];  // of the part's keys or values
};

}  // namespace memplus
