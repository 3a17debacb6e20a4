// Causal grouped-query attention of a ragged batch over paged keys and values:
//
//   out[t, h] = softmax(q[t, h] . K / sqrt(E)) V     over its sequence's tokens up to t itself
//
// LANES keys at a time, from the first on, by an online softmax in fp32 (arXiv 2205.14135). What a
// query gets depends neither on the company in its batch nor on how its prompt was cut: a group of
// keys that it does not see leaves its sums exactly as they were.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "memory_ops/native/simd.h"
#include "memory_ops/native/threads.h"

namespace memplus {

constexpr int64_t TILE_ROWS = 24;  // rows, each one query of one head, that share widened keys

// Tensors of bf16 or fp32 values; H query heads, G KV heads, E values a head.
struct Attention {
  const uint8_t* q;                // [T, H, E], q_stride values from token to token
  const uint8_t* kv;               // [blocks, 2, G, block_size, E]
  const int64_t* block_table;      // [S, table_width]
  const int64_t* query_starts;     // [S + 1]
  const int64_t* context_lengths;  // [S]
  uint8_t* out;                    // [T, H, E]
  int64_t num_sequences, table_width, q_stride, num_heads, num_kv_heads, head_dim, block_size;

  int64_t group_heads() const { return num_heads / num_kv_heads; }
  int64_t tile_queries() const { return std::max<int64_t>(1, TILE_ROWS / group_heads()); }
};

// Queries [first, last) of a sequence, for the heads that share one KV head.
struct QueryTile {
  int64_t sequence, kv_head, first, last;
};

inline std::vector<QueryTile> query_tiles(const Attention& call) {
  std::vector<QueryTile> tiles;
  for (int64_t s = 0; s < call.num_sequences; s++) {
    const int64_t queries = call.query_starts[s + 1] - call.query_starts[s];
    for (int64_t first = 0; first < queries; first += call.tile_queries())
      for (int64_t g = 0; g < call.num_kv_heads; g++)
        tiles.push_back({s, g, first, std::min(first + call.tile_queries(), queries)});
  }
  return tiles;
}

struct Fp32Values {
  static constexpr int64_t bytes = 4;
  static floats widened(const uint8_t* at) { return load<floats>(at); }
  static void narrow(uint8_t* at, float value) { store(at, value); }
};

struct Bf16Values {
  static constexpr int64_t bytes = 2;
  static floats widened(const uint8_t* at) { return load_bf16(at); }
  static void narrow(uint8_t* at, float value) {
    const uint32_t bits = load<uint32_t>(&value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store(at, value == value ? (uint16_t)rounded : (uint16_t)0x7fc0);
  }
};

// The sums of LANES vectors, each in its lane.
template <int COUNT>
inline floats lane_sums(floats* vectors) {
  // halves the vectors again and again: of two, one keeps the lanes whose bit is not set
  if constexpr (COUNT == 1) {
    return vectors[0];
  } else {
    constexpr int half = COUNT / 2;
    const ints lanes = lane_numbers();
    const ints keep = (lanes & half) == 0 ? lanes : (lanes ^ half) + LANES;
    const ints cross = (lanes & half) == 0 ? lanes ^ half : lanes + LANES;
    for (int i = 0; i < half; i++) {
      const floats a = vectors[i], b = vectors[i + half];
      vectors[i] = __builtin_shuffle(a, b, keep) + __builtin_shuffle(a, b, cross);
    }
    return lane_sums<half>(vectors);
  }
}

inline float largest(floats lanes) {
  float most = lanes[0];
  for (int lane = 1; lane < LANES; lane++) most = std::max(most, lanes[lane]);
  return most;
}

// What one thread works on: a tile's rows, and LANES keys and values; rows padded to whole vectors.
template <class Values>
class TileWorker {
 public:
  explicit TileWorker(const Attention& call)
      : call_(call),
        vectors_((call.head_dim + LANES - 1) / LANES),
        rows_(call.tile_queries() * call.group_heads()),
        q_(rows_ * vectors_),
        sums_(rows_ * vectors_),
        keys_(LANES * vectors_),
        values_(LANES * vectors_),
        weights_(rows_),
        totals_(rows_),
        largest_(rows_) {}

  void run(const QueryTile& tile) {
    const int64_t start = call_.query_starts[tile.sequence];
    const int64_t queries = call_.query_starts[tile.sequence + 1] - start;
    const int64_t before = call_.context_lengths[tile.sequence] - queries;
    const int64_t rows = (tile.last - tile.first) * call_.group_heads();
    for (int64_t row = 0; row < rows; row++) read_query(tile, start, row);
    const int64_t seen = before + tile.last;
    for (int64_t first = 0; first < seen; first += LANES) {
      const int64_t count = std::min<int64_t>(LANES, seen - first);
      read_keys(tile, first, count);
      for (int64_t row = 0; row < rows; row++) {
        const int64_t position = before + tile.first + row / call_.group_heads();
        weigh(row, position + 1 - first);
      }
      int64_t row = 0;
      for (; row + 4 <= rows; row += 4) add_values<4>(row);
      for (; row < rows; row++) add_values<1>(row);
    }
    for (int64_t row = 0; row < rows; row++) write(tile, start, row);
  }

 private:
  static constexpr int64_t bytes = Values::bytes;

  int64_t head(const QueryTile& tile, int64_t row) const {
    return tile.kv_head * call_.group_heads() + row % call_.group_heads();
  }

  // Widens `head_dim` values to whole vectors, zeros behind them.
  void widen(const uint8_t* from, floats* to) const {
    const int64_t whole = call_.head_dim / LANES, left = call_.head_dim % LANES;
    for (int64_t v = 0; v < whole; v++) to[v] = Values::widened(from + v * LANES * bytes);
    if (!left) return;
    uint8_t last[LANES * bytes] = {};
    std::memcpy(last, from + whole * LANES * bytes, left * bytes);
    to[whole] = Values::widened(last);
  }

  void read_query(const QueryTile& tile, int64_t start, int64_t row) {
    const int64_t token = start + tile.first + row / call_.group_heads();
    const int64_t at = token * call_.q_stride + head(tile, row) * call_.head_dim;
    widen(call_.q + at * bytes, &q_[row * vectors_]);
    const float scale = 1.f / __builtin_sqrtf((float)call_.head_dim);
    for (int64_t v = 0; v < vectors_; v++) {
      q_[row * vectors_ + v] *= splat(scale);
      sums_[row * vectors_ + v] = floats{};
    }
    totals_[row] = floats{};
    largest_[row] = -std::numeric_limits<float>::infinity();
  }

  void read_keys(const QueryTile& tile, int64_t first, int64_t count) {
    const int64_t block_values = call_.block_size * call_.head_dim;
    const int64_t half = call_.num_kv_heads * block_values * bytes;
    const int64_t* blocks = call_.block_table + tile.sequence * call_.table_width;
    for (int64_t i = 0; i < count; i++) {
      const int64_t block = blocks[(first + i) / call_.block_size];
      const int64_t offset = (first + i) % call_.block_size;
      const uint8_t* key = call_.kv + block * 2 * half +
                           (tile.kv_head * block_values + offset * call_.head_dim) * bytes;
      widen(key, &keys_[i * vectors_]);
      widen(key + half, &values_[i * vectors_]);
    }
    // what no query sees must not be NaN, or its weight of zero would not be enough
    for (int64_t i = count * vectors_; i < LANES * vectors_; i++) keys_[i] = values_[i] = floats{};
  }

  // Scores the keys for a row that sees `seen` of them, and makes room for a new largest score.
  void weigh(int64_t row, int64_t seen) {
    floats dots[LANES] = {};
    for (int64_t v = 0; v < vectors_; v++) {
      const floats q = q_[row * vectors_ + v];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) dots[i] += q * keys_[i * vectors_ + v];
    }
    floats scores = lane_sums<LANES>(dots);
    const floats unseen = splat(-std::numeric_limits<float>::infinity());
    scores = lane_numbers() < splat((int32_t)std::min<int64_t>(seen, LANES)) ? scores : unseen;
    const float before = largest_[row], now = std::max(before, largest(scores));
    if (now > before) {
      const floats factor = exp_negative(splat(before - now));
      totals_[row] *= factor;
      for (int64_t v = 0; v < vectors_; v++) sums_[row * vectors_ + v] *= factor;
      largest_[row] = now;
    }
    weights_[row] = exp_negative(scores - splat(now));
    totals_[row] += weights_[row];
  }

  template <int ROWS>
  void add_values(int64_t row) {
    for (int64_t v = 0; v < vectors_; v++) {
      floats sum[ROWS];
      for (int r = 0; r < ROWS; r++) sum[r] = sums_[(row + r) * vectors_ + v];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        const floats value = values_[i * vectors_ + v];
        for (int r = 0; r < ROWS; r++) sum[r] += splat(weights_[row + r][i]) * value;
      }
      for (int r = 0; r < ROWS; r++) sums_[(row + r) * vectors_ + v] = sum[r];
    }
  }

  void write(const QueryTile& tile, int64_t start, int64_t row) {
    const int64_t token = start + tile.first + row / call_.group_heads();
    const int64_t at = (token * call_.num_heads + head(tile, row)) * call_.head_dim;
    const float factor = 1.f / sum(totals_[row]);
    const float* sums = (const float*)&sums_[row * vectors_];
    for (int64_t e = 0; e < call_.head_dim; e++)
      Values::narrow(call_.out + (at + e) * bytes, sums[e] * factor);
  }

  const Attention& call_;
  const int64_t vectors_, rows_;
  std::vector<floats> q_, sums_, keys_, values_, weights_, totals_;
  std::vector<float> largest_;
};

template <class Values>
inline void attend(const Attention& call) {
  const std::vector<QueryTile> tiles = query_tiles(call);
  // tiles differ in length: whoever is done takes the next
  std::atomic<size_t> next{0};
  in_parallel((int64_t)tiles.size(), [&](int64_t, int64_t) {
    TileWorker<Values> worker(call);
    for (size_t i = next++; i < tiles.size(); i = next++) worker.run(tiles[i]);
  });
}

}  // namespace memplus
