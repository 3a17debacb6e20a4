// Causal grouped-query attention of a ragged batch over paged keys and values:
//
//   out[t, h] = softmax(q[t, h] . K / sqrt(E)) V     over its sequence's tokens up to and with t
//
// It first normalises and rotates queries and keys (heads.h), and writes this step's keys and values
// into their blocks.
#pragma once

#include <atomic>
#include <vector>

#include "attention_call.h"
#include "attention_tile.h"
#include "heads.h"
#include "int8_products.h"
#include "value_products.h"
#include "values.h"
#include "memory_ops/native/threads.h"

namespace memplus {

inline void list_tiles(const Attention& call, std::vector<QueryTile>& tiles) {
  tiles.clear();
  for (int64_t s = 0; s < call.num_sequences; s++) {
    const int64_t queries = call.query_starts[s + 1] - call.query_starts[s];
    for (int64_t first = 0; first < queries; first += call.tile_queries())
      for (int64_t g = 0; g < call.num_kv_heads; g++)
        tiles.push_back({s, g, first, std::min(first + call.tile_queries(), queries)});
  }
}

// Writes the rotated keys and the values of some tokens of the batch.
template <class Values, class Products>
inline void write_keys(const Attention& call, Span tokens) {
  const typename Products::Areas areas(call);
  const int64_t vectors = call.head_dim / LANES + 1;
  floats *key = kept_vectors<struct KvRows>(2 * vectors), *value = key + vectors;
  for (int64_t s = 0; s < call.num_sequences; s++) {
    const int64_t start = call.query_starts[s], end = call.query_starts[s + 1];
    for (int64_t t = std::max(start, tokens.first); t < std::min(end, tokens.last); t++) {
      const int64_t position = call.context_lengths[s] - (end - t);
      for (int64_t g = 0; g < call.num_kv_heads; g++) {
        read_rotated<Values>(call, t, call.num_heads + g, key);
        read_head<Values>(call, t, call.num_heads + call.num_kv_heads + g, value);
        uint8_t* area = call.kv + call.kv_area(s, g, position) * areas.bytes();
        Products::write(areas, area, position % call.block_size, key, value);
      }
    }
  }
}

// The tiles of a call; threads take them one by one, since tiles differ in length.
class TileQueue {
 public:
  explicit TileQueue(const Attention& call) : tiles_(kept_tiles()) {
    list_tiles(call, tiles_);
  }

  int64_t size() const { return (int64_t)tiles_.size(); }

  const QueryTile* take() {
    const size_t i = next_++;
    return i < tiles_.size() ? &tiles_[i] : nullptr;
  }

  // Prepares another call of the same batch; no thread may be taking tiles.
  void start_over() { next_ = 0; }

 private:
  static std::vector<QueryTile>& kept_tiles() {
    static thread_local std::vector<QueryTile> kept;
    return kept;
  }

  std::vector<QueryTile>& tiles_;
  std::atomic<size_t> next_{0};
};

template <class Values, class Products>
inline void attend_with(const Attention& call, TileQueue& tiles, int64_t thread, int64_t threads) {
  write_keys<Values, Products>(call, piece(call.num_tokens(), thread, threads));
  barrier(threads);
  TileWorker<Values, Products>(call).run([&] { return tiles.take(); });
}

// Runs one thread's share of a call; every thread of the team must call it.
template <class Values>
inline void attend_share(const Attention& call, TileQueue& tiles, int64_t thread,
                         int64_t threads) {
  call.has_int8_kv ? attend_with<Values, Int8Products>(call, tiles, thread, threads)
                   : attend_with<Values, ValueProducts<Values>>(call, tiles, thread, threads);
}

template <class Values>
inline void attend(const Attention& call) {
  TileQueue tiles(call);
  in_parallel(tiles.size(), [&](int64_t thread, int64_t threads) {
    attend_share<Values>(call, tiles, thread, threads);
  });
}

}  // namespace memplus
