// The products of a tile's queries and weights with keys and values in the dtype of the model.
#pragma once

#include "kept.h"
#include "part_lines.h"
#include "product_tiles.h"
#include "values.h"

namespace memplus {

template <class Values>
class ValueProducts {
  static constexpr bool HAS_TILES = TILE_STEPS > 1 && Values::bytes == 2;
  using Lines = PartLines<Values::bytes, HAS_TILES ? TILE_STEPS : 1>;

 public:
  using Weights = Values;  // the form in which add_values() takes weights
  using Areas = KvAreas<Values::bytes>;
  using Part = typename Lines::Part;

  explicit ValueProducts(const Attention& call)
      : head_dim_(call.head_dim), lines_(call),
        query_bytes_(lines_.out_vectors() * (int64_t)sizeof(floats)) {
    queries_ = kept_bytes<ValueProducts>(buffer_rows(call) * query_bytes_);
  }

  int64_t out_vectors() const { return lines_.out_vectors(); }  // per row of sums

  // Writes the key and the value of one token, in fp32.
  static void write(const Areas& areas, uint8_t* area, int64_t token, floats* key, floats* value) {
    // narrowed in place, from the first on
    Values::write((uint8_t*)key, key, areas.head_dim);
    Values::write((uint8_t*)value, value, areas.head_dim);
    areas.write(area, token, (uint8_t*)key, (uint8_t*)value);
  }

  // Keeps a query as a row of the tile.
  void keep_query(int64_t row, const floats* query) {
    uint8_t* to = queries_ + row * query_bytes_;
    std::memset(to, 0, query_bytes_);
    Values::write(to, query, head_dim_);
  }

  // Writes the products of queries and keys, PART per row; prefetches the next part's keys.
  void score(const Part& part, const Part& next, floats* scores) {
    const int64_t vectors = part.shown() / LANES;
    for (int64_t row = 0; row < part.rows; row++)
      std::fill_n(scores + row * PART_VECTORS, vectors, floats{});
    add_products<Values>(part.rows, vectors, {queries_, query_bytes_}, lines_.keys(part, next),
                         {scores, PART_VECTORS}, lines_.key_steps());
  }

  // Adds the weighted values to the rows of sums; prefetches the next part's values.
  void add_values(const Part& part, const Part& next, const floats* weights, floats* sums) {
    const WordRows rows = {(const uint8_t*)weights, PART * WORD};
    const VectorRows into = {sums, out_vectors()};
    const int64_t steps = part.shown() / Areas::LINE_TOKENS;
    if constexpr (HAS_TILES)
      add_products<Values>(part.rows, out_vectors(), rows, lines_.copied_values(part, next), into,
                           steps);
    else
      add_products<Values>(part.rows, out_vectors(), rows, lines_.values(part, next), into, steps);
  }

 private:
  const int64_t head_dim_;
  Lines lines_;
  const int64_t query_bytes_;
  uint8_t* queries_;
};

}  // namespace memplus
