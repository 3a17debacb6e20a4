// Runs consecutive decoder layers with one team of threads: starting a team and returning to Python
// takes as long as reading some of the weights.
#pragma once

#include <optional>

#include "attention.h"
#include "kept.h"
#include "linear.h"
#include "memory_layer.h"

namespace memplus {

// The products of one layer: attention, then gate_up and down, a memory, both or neither; and the
// norms of its heads, or null.
struct DecoderLayer {
  const PackedLinear *qkv, *out, *gate_up, *down;
  const MemoryLayer* memory;
  const HeadNorms* head_norms;
};

// Buffers between the parts of a layer, shared by all threads of a team.
struct LayerRoom {
  uint8_t *qkv, *attended, *hidden, *prepared;
  MemoryRoom memory;
};

template <class Values>
class DecoderLayers {
 public:
  // `call` has no qkv, norms and out yet, and its kv is the first layer's; those of the others follow at
  // `kv_bytes`. `residual` [T, D] is changed in place. `chosen` has space for all memory layers.
  DecoderLayers(const Attention& call, int64_t kv_bytes, uint8_t* residual, ChosenRows chosen)
      : call_(call), kv_bytes_(kv_bytes), residual_(residual), chosen_(chosen),
        rows_(call.num_tokens()), work_(num_threads()) {}

  // residual += out(attention(qkv(residual)));  residual += memory(residual) + down(gate_up(residual))
  //
  // Stops early if rows could not be read.
  ReadFailure run(const DecoderLayer* layers, int64_t count) {
    make_room(layers, count);
    TileQueue tiles(call_);
    in_parallel(work_.size(), [&](int64_t thread, int64_t threads) {
      ChosenRows chosen = chosen_;
      for (int64_t i = 0, memory = 0; i < count; i++) {
        attend(layers[i], i, tiles, thread, threads);
        const DecoderLayer& layer = layers[i];
        if (layer.memory) {
          if (!look_up(layer, memory++, chosen, thread, threads)) return;
          chosen.rows += rows_ * layer.memory->token_rows();
          chosen.weights += rows_ * layer.memory->token_rows();
          if (chosen.patches) chosen.patches++;
          // gate_up has read the residual stream before
          multiply(into_residual(*layer.memory->values, room_.memory.gated), thread, threads);
        } else if (layer.gate_up) {
          multiply_gate_up(layer, thread, threads);
        }
        if (layer.gate_up) multiply(into_residual(*layer.down, room_.hidden), thread, threads);
      }
    });
    return failure_;
  }

 private:
  LinearCall into_room(const PackedLinear& linear, uint8_t* out) const {
    return {linear, residual_, linear.inputs * Values::bytes, rows_, nullptr, out,
            call_.progress};
  }

  LinearCall into_residual(const PackedLinear& linear, const uint8_t* x) const {
    return {linear, x, linear.inputs * Values::bytes, rows_, residual_, residual_,
            call_.progress};
  }

  LinearCall scores_of(const MemoryLayer& memory, Span tokens) const {
    const int64_t stride = memory.query->outputs * Values::bytes;
    return {*memory.subkeys, room_.memory.queries + tokens.first * stride, stride,
            tokens.last - tokens.first, nullptr, (uint8_t*)room_.memory.scores, call_.progress};
  }

  // A barrier follows each call, so that calls can share `prepared`.
  void multiply(const LinearCall& call, int64_t thread, int64_t threads) {
    run_share<Values>(call, room_.prepared, work_, thread, threads);
    barrier(threads);
  }

  void attend(const DecoderLayer& layer, int64_t index, TileQueue& tiles, int64_t thread,
              int64_t threads) {
    multiply(into_room(*layer.qkv, room_.qkv), thread, threads);
    Attention call = call_;
    call.qkv = room_.qkv, call.out = room_.attended, call.kv += index * kv_bytes_;
    call.norms = layer.head_norms;
    attend_share<Values>(call, tiles, thread, threads);
    barrier(threads);
    if (thread == 0) tiles.start_over();
    multiply(into_residual(*layer.out, room_.attended), thread, threads);
  }

  // Computes the gated sums of a layer's memory, which is number `index`, and the product gate_up if
  // the layer has one. Returns false to all threads if rows could not be read.
  bool look_up(const DecoderLayer& layer, int64_t index, ChosenRows chosen, int64_t thread,
               int64_t threads) {
    const MemoryLayer& memory = *layer.memory;
    multiply(into_room(*memory.query, room_.memory.queries), thread, threads);
    for (int64_t first = 0; first < rows_; first += CHOOSING_TOKENS) {
      const Span tokens = {first, std::min(first + CHOOSING_TOKENS, rows_)};
      multiply(scores_of(memory, tokens), thread, threads);
      choose_share(memory, room_.memory.scores, tokens, chosen, thread, threads);
      barrier(threads);
    }
    if (memory.fetcher) {
      if (!gather_fetched(layer, index, chosen, thread, threads)) return false;
    } else {
      multiply_gates(layer, thread, threads);
      gather_share<Values>(memory, chosen, chosen.rows, room_.memory, {0, rows_}, call_.progress,
                           thread, threads);
      barrier(threads);
    }
    return true;
  }

  void multiply_gate_up(const DecoderLayer& layer, int64_t thread, int64_t threads) {
    multiply(into_room(*layer.gate_up, room_.hidden), thread, threads);
  }

  // The products that need no rows.
  void multiply_gates(const DecoderLayer& layer, int64_t thread, int64_t threads) {
    const MemoryLayer& memory = *layer.memory;
    if (memory.gate) multiply(into_room(*memory.gate, room_.memory.gates), thread, threads);
    if (layer.gate_up) multiply_gate_up(layer, thread, threads);
  }

  // The first thread starts fetching rows; meanwhile all threads compute the gates.
  bool gather_fetched(const DecoderLayer& layer, int64_t index, ChosenRows chosen, int64_t thread,
                      int64_t threads) {
    const MemoryLayer& memory = *layer.memory;
    std::optional<Fetch> fetch;
    if (thread == 0) {
      fetch.emplace(*memory.fetcher, chosen.rows, rows_, memory.token_rows(), room_.memory.slots);
      fetch->start();
    }
    multiply_gates(layer, thread, threads);
    for (int64_t first = 0; first < rows_;) {
      if (thread == 0) {
        if (!fetch->finish(failure_)) failure_.memory = index;
        fetched_ = fetch->last();
      }
      barrier(threads);
      if (failure_.memory >= 0) return false;
      const Span tokens = {first, fetched_};
      gather_share<Values>(memory, chosen, room_.memory.slots, room_.memory, tokens,
                           call_.progress, thread, threads);
      first = tokens.last;
      barrier(threads);
      if (thread == 0 && first < rows_) fetch->start();
    }
    return true;
  }

  void make_room(const DecoderLayer* layers, int64_t count) {
    Sizes sizes;
    for (int64_t i = 0; i < count; i++) {
      const DecoderLayer& layer = layers[i];
      sizes.need_prepared(into_room(*layer.qkv, nullptr));
      sizes.need_prepared(into_residual(*layer.out, nullptr));
      sizes.qkv = std::max(sizes.qkv, layer.qkv->outputs);
      sizes.attended = std::max(sizes.attended, layer.out->inputs);
      if (layer.memory) measure(sizes, *layer.memory);
      if (!layer.gate_up) continue;
      sizes.need_prepared(into_room(*layer.gate_up, nullptr));
      sizes.need_prepared(into_residual(*layer.down, nullptr));
      sizes.hidden = std::max(sizes.hidden, layer.down->inputs);
    }
    const int64_t bytes = rows_ * Values::bytes, chosen_tokens = std::min(rows_, CHOOSING_TOKENS);
    room_.qkv = kept_bytes<struct QkvRows>(bytes * sizes.qkv);
    room_.attended = kept_bytes<struct AttendedRows>(bytes * sizes.attended);
    room_.hidden = kept_bytes<struct HiddenRows>(bytes * sizes.hidden);
    room_.prepared = kept_bytes<struct PreparedRows>(sizes.prepared);
    MemoryRoom& memory = room_.memory;
    memory.queries = kept_bytes<struct Queries>(bytes * sizes.queries);
    memory.gates = kept_bytes<struct Gates>(bytes * sizes.values);
    memory.gated = kept_bytes<struct GatedSums>(bytes * sizes.values);
    memory.sums = (float*)kept_bytes<struct RowSums>(rows_ * sizes.values * 4);
    memory.scores = (float*)kept_bytes<struct HalfScores>(chosen_tokens * sizes.scores * 4);
    memory.slots = (int64_t*)kept_bytes<struct FetchedSlots>(rows_ * sizes.slots * 8);
  }

  // The largest number of values per token of each buffer, and bytes for prepared rows.
  struct Sizes {
    int64_t qkv = 0, attended = 0, hidden = 0, queries = 0, scores = 0, values = 0, slots = 0;
    int64_t prepared = 0;

    void need_prepared(const LinearCall& call) {
      prepared = std::max(prepared, prepared_bytes<Values>(call));
    }
  };

  void measure(Sizes& sizes, const MemoryLayer& memory) const {
    sizes.need_prepared(into_room(*memory.query, nullptr));
    if (memory.gate) sizes.need_prepared(into_room(*memory.gate, nullptr));
    sizes.need_prepared(into_residual(*memory.values, nullptr));
    sizes.need_prepared(scores_of(memory, {0, std::min(rows_, CHOOSING_TOKENS)}));
    sizes.queries = std::max(sizes.queries, memory.query->outputs);
    sizes.scores = std::max(sizes.scores, memory.token_scores());
    sizes.values = std::max(sizes.values, memory.table.value_dim);
    if (memory.fetcher) sizes.slots = std::max(sizes.slots, memory.token_rows());
  }

  const Attention call_;
  const int64_t kv_bytes_;
  uint8_t* const residual_;
  const ChosenRows chosen_;
  const int64_t rows_;
  SharedWork work_;
  LayerRoom room_{};
  // tokens fetched so far, and any failure; the first thread writes them before a barrier
  int64_t fetched_ = 0;
  ReadFailure failure_;
};

}  // namespace memplus
