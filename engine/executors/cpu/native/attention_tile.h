// Attention of the rows of one tile, each a query of one head, over the keys that they share.
//
// Keys are processed in order, in parts of PART, with an online softmax (arXiv 2205.14135). So the
// result of a query depends neither on the other queries of its batch nor on how its prompt was
// split: keys that it must not see get a weight of exactly 0.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_call.h"
#include "heads.h"
#include "kept.h"
#include "key_parts.h"
#include "matrix_tiles.h"
#include "memory_ops/native/simd.h"
#include "values.h"

namespace memplus {

// The state of one thread; its buffers are reused between calls. `Products` reads keys and values.
template <class Values, class Products>
class TileWorker {
  using Weights = typename Products::Weights;
  using Part = typename Products::Part;

 public:
  explicit TileWorker(const Attention& call)
      : call_(call), areas_(call), products_(call), out_vectors_(products_.out_vectors()) {
    const int64_t rows = buffer_rows(call);
    floats* free =
        kept_vectors<TileWorker>(rows * (out_vectors_ + 2 + PART_VECTORS) + out_vectors_);
    const auto take = [&](int64_t count) { return std::exchange(free, free + count); };
    sums_ = take(rows * out_vectors_);
    totals_ = take(rows);
    scores_ = take(rows * PART_VECTORS);
    query_ = take(out_vectors_);
    largest_ = (float*)take(rows);
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
      if (now->first == 0)
        for (int64_t row = 0; row < now->rows; row++) read_query(*now->tile, row);
      products_.score(*now, *next, scores_);
      mask(*now);
      for (int64_t row = 0; row < now->rows; row++) weigh(row, now->shown());
      products_.add_values(*now, *next, scores_, sums_);
      call_.progress.mark();
      if (is_last)
        for (int64_t row = 0; row < now->rows; row++) write(*now->tile, row);
    }
  }

 private:
  int64_t head(const QueryTile& tile, int64_t row) const {
    return tile.kv_head * call_.group_heads() + row % call_.group_heads();
  }

  int64_t token(const QueryTile& tile, int64_t row) const {
    return call_.query_starts[tile.sequence] + tile.first + row / call_.group_heads();
  }

  void read_query(const QueryTile& tile, int64_t row) {
    const int64_t token = this->token(tile, row);
    read_rotated<Values>(call_, token, head(tile, row), query_);
    products_.keep_query(row, query_);
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
    int64_t at = 0;  // always at a quad's first key
    while (at < part.count) {
      const int64_t position = first + at, token = position % call_.block_size;
      uint8_t* area =
          call_.kv + call_.kv_area(tile->sequence, tile->kv_head, position) * areas_.bytes();
      const int64_t end = std::min(part.count, at + call_.block_size - token);
      for (int64_t inside = token; at < end; at += QUAD, inside += QUAD) {
        part.keys[at / QUAD] = areas_.key(area, inside);
        part.lines[at / QUAD] = areas_.line(area, inside);
      }
    }
    for (; at < part.shown(); at += QUAD) part.keys[at / QUAD] = part.keys[0];
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

  // Converts a row's scores to weights in place, as Weights; rescales sums to a new largest score.
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
      const floats weights = Weights::rounded(exp_negative(scores[v] - splat(now)));
      totals_[row] += weights;
      Weights::narrow(to + v * LANES * Weights::bytes, weights);
    }
  }

  void write(const QueryTile& tile, int64_t row) {
    const int64_t at = (token(tile, row) * call_.num_heads + head(tile, row)) * call_.head_dim;
    const floats factor = splat(1.f / sum(totals_[row]));
    floats* sums = sums_ + row * out_vectors_;
    for (int64_t v = 0; v < out_vectors_; v++) sums[v] *= factor;
    Values::write(call_.out + at * Values::bytes, sums, call_.head_dim);
  }

  const Attention& call_;
  const typename Products::Areas areas_;
  Products products_;
  const int64_t out_vectors_;           // per row of sums
  floats *sums_, *totals_, *scores_;  // per row
  floats* query_;
  float* largest_;
  Part parts_[2];
};

}  // namespace memplus
