// The products of a tile's queries and weights with keys and values in the dtype of the model.
#pragma once

#include <algorithm>
#include <utility>

#include "kept.h"
#include "key_parts.h"
#include "kv_areas.h"
#include "product_tiles.h"
#include "values.h"

namespace memplus {

template <class Values>
class ValueProducts {
  using Areas = KvAreas<Values::bytes>;
  static constexpr int64_t LINE_TOKENS = Areas::LINE_TOKENS;
  static constexpr bool HAS_TILES = TILE_STEPS > 1 && Values::bytes == 2;
  static constexpr int64_t STEPS = HAS_TILES ? TILE_STEPS : 1;  // that a product reads together

 public:
  using Weights = Values;  // the form in which add_values() takes weights
  using Part = KeyPart<std::max<int64_t>(LANES, LINE_TOKENS * STEPS)>;

  static int64_t area_bytes(const Attention& call) {
    return call.block_size * call.head_dim * Values::bytes;
  }

  static const uint8_t* key_at(const uint8_t* area, int64_t token) {
    return area + Areas::key_at(token);
  }

  static const uint8_t* line_at(const uint8_t* area, int64_t token, int64_t head_dim) {
    return area + Areas::line_at(token, head_dim);
  }

  explicit ValueProducts(const Attention& call)
      : call_(call),
        key_steps_(rounded_up(call.head_dim / LINE_TOKENS, STEPS)),
        out_vectors_((call.head_dim + LANES - 1) / LANES),
        scores_in_place_(call.block_size % LANES == 0 && key_steps_ * LINE_TOKENS == call.head_dim),
        adds_in_place_(call.head_dim % LANES == 0 && !HAS_TILES) {
    const int64_t rows = buffer_rows(call), lines = PART / LINE_TOKENS;
    const int64_t arranged = std::max(key_steps_ * PART_VECTORS, lines * out_vectors_);
    floats* free = kept_vectors<ValueProducts>((rows + 3) * out_vectors_ + arranged);
    const auto take = [&](int64_t count) { return (uint8_t*)std::exchange(free, free + count); };
    queries_ = take(rows * out_vectors_);
    nothing_ = take(out_vectors_);
    last_ = take(out_vectors_);
    vectors_ = (const uint8_t**)take(out_vectors_);
    arranged_ = take(arranged);
    std::memset(nothing_, 0, row_bytes());
  }

  int64_t out_vectors() const { return out_vectors_; }  // per row of sums

  // Writes the key and the value of one token, in fp32, to their areas.
  void write(uint8_t* keys, uint8_t* values, int64_t token, const floats* key,
             const floats* value) const {
    Values::write(last_, key, call_.head_dim);
    Areas::write_key(keys, last_, call_.head_dim, call_.block_size, token);
    Values::write(last_, value, call_.head_dim);
    Areas::write_value(values, last_, call_.head_dim, token);
  }

  // Keeps a query as a row of the tile.
  void keep_query(int64_t row, const floats* query) {
    uint8_t* to = queries_ + row * row_bytes();
    std::memset(to, 0, row_bytes());
    Values::write(to, query, call_.head_dim);
  }

  // Writes the products of queries and keys, PART per row; prefetches the next part's keys.
  void score(const Part& part, const Part& next, floats* scores) {
    const int64_t shown = part.shown() / LANES;
    const uint8_t *vectors[PART_VECTORS], *fetched[PART_VECTORS];
    for (int64_t v = 0; v < shown; v++) {
      vectors[v] = part.keys[v * LANES / QUAD];
      fetched[v] = v * LANES < next.count ? next.keys[v * LANES / QUAD] : vectors[v];
    }
    if (!scores_in_place_) arrange_keys(part, vectors, fetched);
    const int64_t stride = scores_in_place_ ? call_.block_size * WORD : PART * WORD;
    for (int64_t row = 0; row < part.rows; row++)
      std::fill_n(scores + row * PART_VECTORS, shown, floats{});
    add_products<Values>(part.rows, shown, {queries_, row_bytes()},
                         VectorLines{vectors, fetched, stride}, {scores, PART_VECTORS},
                         key_steps_);
  }

  // Adds the weighted values to the rows of sums; prefetches the next part's values.
  void add_values(const Part& part, const Part& next, const floats* weights, floats* sums) {
    const int64_t shown = part.shown() / LINE_TOKENS;
    const uint8_t *lines[PART / LINE_TOKENS], *fetched[PART / LINE_TOKENS];
    for (int64_t i = 0; i < shown; i++) {
      lines[i] = line(part, i * LINE_TOKENS);
      fetched[i] = i * LINE_TOKENS < next.count ? line_at(next, i * LINE_TOKENS) : lines[i];
    }
    if (!adds_in_place_) arrange_lines(lines, fetched, shown);
    const WordRows rows = {(const uint8_t*)weights, PART * WORD};
    const VectorRows into = {sums, out_vectors_};
    if constexpr (HAS_TILES)
      add_products<Values>(part.rows, out_vectors_, rows,
                           VectorLines{vectors_, vectors_, row_bytes()}, into, shown);
    else
      add_products<Values>(part.rows, out_vectors_, rows, PlacedLines{lines, fetched}, into, shown);
  }

 private:
  int64_t row_bytes() const { return out_vectors_ * (int64_t)sizeof(floats); }

  // Copies the part's keys to buffers from which vectors can be read; zeros follow their words.
  void arrange_keys(const Part& part, const uint8_t** vectors, const uint8_t** fetched) {
    const int64_t words = call_.head_dim / LINE_TOKENS, quads = part.shown() / QUAD;
    for (int64_t step = 0; step < key_steps_; step++)
      for (int64_t quad = 0; quad < quads; quad++) {
        uint8_t* to = arranged_ + (step * PART + quad * QUAD) * WORD;
        const uint8_t* from = part.keys[quad] + step * call_.block_size * WORD;
        step < words ? std::memcpy(to, from, QUAD * WORD) : std::memset(to, 0, QUAD * WORD);
      }
    for (int64_t v = 0; v < part.shown() / LANES; v++)
      vectors[v] = fetched[v] = arranged_ + v * sizeof(floats);
  }

  // Copies lines to a buffer that has whole vectors, one after the other.
  void arrange_lines(const uint8_t** lines, const uint8_t** fetched, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      uint8_t* to = arranged_ + i * row_bytes();
      std::memcpy(to, lines[i], call_.head_dim * WORD);
      for (int64_t byte = 0; byte < row_bytes(); byte += LINE)
        __builtin_prefetch(fetched[i] + byte);
      lines[i] = fetched[i] = to;
    }
    for (int64_t v = 0; v < out_vectors_; v++) vectors_[v] = arranged_ + v * sizeof(floats);
  }

  const uint8_t* line_at(const Part& part, int64_t at) const {
    return part.values[at / QUAD] + Areas::line_at(at % QUAD, call_.head_dim);
  }

  // The line of the value of a part's key. Missing values are 0, since a weight of 0 would not cancel
  // a NaN.
  const uint8_t* line(const Part& part, int64_t at) {
    if (at >= part.count) return nothing_;
    const uint8_t* from = line_at(part, at);
    if (at + LINE_TOKENS <= part.count) return from;
    const uint32_t present = (1u << (part.count - at) * Values::bytes * 8) - 1;
    for (int64_t byte = 0; byte < call_.head_dim * WORD; byte += WORD)
      store(last_ + byte, load<uint32_t>(from + byte) & present);
    return last_;
  }

  const Attention& call_;
  const int64_t key_steps_, out_vectors_;
  const bool scores_in_place_, adds_in_place_;
  uint8_t *queries_, *nothing_, *last_, *arranged_;
  const uint8_t** vectors_;  // of the arranged lines
};

}  // namespace memplus
