// Decoder layers one after another, by one team of threads from the first product to the last:
// starting a team, and coming back to Python, takes as long as reading some of the weights.
#pragma once

#include "attention.h"
#include "kept.h"
#include "linear.h"

namespace memplus {

// The products of one layer. Where gate_up is null, so is down, and only the attention is run.
struct DecoderLayer {
  const PackedLinear *qkv, *out, *gate_up, *down;
};

// Room for what the parts of a layer hand on, which all threads of a team share.
struct LayerRoom {
  uint8_t *qkv, *attended, *hidden, *prepared;
};

template <class Values>
class DecoderLayers {
 public:
  // `call` lacks its qkv and out, and its kv is the first layer's, those of the others `kv_bytes`
  // apart; `residual` [T, D] is changed in place.
  DecoderLayers(const Attention& call, int64_t kv_bytes, uint8_t* residual)
      : call_(call), kv_bytes_(kv_bytes), residual_(residual), rows_(call.num_tokens()),
        work_(omp_get_max_threads()) {}

  // residual += out(attention(qkv(residual)));  residual += down(gate_up(residual))
  void run(const DecoderLayer* layers, int64_t count) {
    make_room(layers, count);
    TileQueue tiles(call_);
    in_parallel(INT64_MAX, [&](int64_t thread, int64_t threads) {
      for (int64_t i = 0; i < count; i++) {
        attend(layers[i], i, tiles, thread, threads);
        if (layers[i].gate_up) feed_forward(layers[i], thread, threads);
      }
    });
  }

 private:
  LinearCall into_room(const PackedLinear& linear, uint8_t* out) const {
    return {linear, residual_, linear.inputs * Values::bytes, rows_, nullptr, out};
  }

  LinearCall into_residual(const PackedLinear& linear, const uint8_t* x) const {
    return {linear, x, linear.inputs * Values::bytes, rows_, residual_, residual_};
  }

  // Calls come one after another, with a barrier behind each: so they can share `prepared`.
  void multiply(const LinearCall& call, int64_t thread, int64_t threads) {
    run_share<Values>(call, room_.prepared, work_, thread, threads);
#pragma omp barrier
  }

  void attend(const DecoderLayer& layer, int64_t index, TileQueue& tiles, int64_t thread,
              int64_t threads) {
    multiply(into_room(*layer.qkv, room_.qkv), thread, threads);
    Attention call = call_;
    call.qkv = room_.qkv, call.out = room_.attended, call.kv += index * kv_bytes_;
    attend_share<Values>(call, tiles, thread, threads);
#pragma omp barrier
    if (thread == 0) tiles.start_over();
    multiply(into_residual(*layer.out, room_.attended), thread, threads);
  }

  void feed_forward(const DecoderLayer& layer, int64_t thread, int64_t threads) {
    multiply(into_room(*layer.gate_up, room_.hidden), thread, threads);
    multiply(into_residual(*layer.down, room_.hidden), thread, threads);
  }

  void make_room(const DecoderLayer* layers, int64_t count) {
    int64_t qkv = 0, attended = 0, hidden = 0, prepared = 0;
    const auto prepare = [&](const LinearCall& call) {
      prepared = std::max(prepared, prepared_bytes<Values>(call));
    };
    for (int64_t i = 0; i < count; i++) {
      const DecoderLayer& layer = layers[i];
      prepare(into_room(*layer.qkv, nullptr));
      prepare(into_residual(*layer.out, nullptr));
      qkv = std::max(qkv, layer.qkv->outputs);
      attended = std::max(attended, layer.out->inputs);
      if (!layer.gate_up) continue;
      prepare(into_room(*layer.gate_up, nullptr));
      prepare(into_residual(*layer.down, nullptr));
      hidden = std::max(hidden, layer.down->inputs);
    }
    room_.qkv = kept_bytes<struct QkvRows>(rows_ * qkv * Values::bytes);
    room_.attended = kept_bytes<struct AttendedRows>(rows_ * attended * Values::bytes);
    room_.hidden = kept_bytes<struct HiddenRows>(rows_ * hidden * Values::bytes);
    room_.prepared = kept_bytes<struct PreparedRows>(prepared);
  }

  const Attention call_;
  const int64_t kv_bytes_;
  uint8_t* const residual_;
  const int64_t rows_;
  SharedWork work_;
  LayerRoom room_{};
};

}  // namespace memplus
