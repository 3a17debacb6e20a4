// The weights of linear layers in the layout of linear.h. A panel holds the weights of
// PANEL_VECTORS vectors of outputs: step by step over the inputs, for each output the 4 bytes of
// that step (two bf16 values or one fp32), so that one load reads weights of LANES outputs.
#pragma once

#include <algorithm>

#include "matrix_tiles.h"
#include "memory_ops/native/simd.h"
#include "memory_ops/native/threads.h"

namespace memplus {

constexpr int PANEL_VECTORS = 2;

// A product of `blocks` blocks; each maps its own `inputs` values of a row to `outputs` values.
struct PackedLinear {
  uint8_t* panels;              // [blocks, block_panels, steps, PANEL_VECTORS, LANES] of 4 bytes
  float* bias;                  // one per place in the panels, or null
  const uint8_t* norm_weights;  // [norm_rows, inputs], or null: row b % norm_rows for block b
  int64_t norm_rows;
  int64_t blocks, inputs, outputs;
  float norm_eps;
  int32_t is_bf16;           // else fp32
  int32_t is_gated;          // a panel has vectors of the gate and of its factor
  int32_t has_wide_outputs;  // fp32 outputs for any inputs

  int64_t value_bytes() const { return is_bf16 ? 2 : 4; }
  int64_t steps() const {
    const int64_t used = (inputs * value_bytes() + 3) / 4;
    // matrix tiles read whole tiles of steps
    return is_bf16 ? (used + TILE_STEPS - 1) / TILE_STEPS * TILE_STEPS : used;
  }
  int64_t panel_outputs() const { return is_gated ? LANES : PANEL_VECTORS * LANES; }
  int64_t block_panels() const { return (outputs + panel_outputs() - 1) / panel_outputs(); }
  int64_t panel_bytes() const { return steps() * PANEL_VECTORS * sizeof(words); }
};

// Rows of the weights of one block, `stride` bytes apart, for its outputs from `first` on, and their
// bias or null. In a gated block, part 0 is the gate and part 1 its factor.
struct WeightRows {
  const uint8_t* rows;
  int64_t stride;
  const float* bias;
  int64_t count;
  int64_t block, first, part;
};

// The index of an output among the lanes of all panels of its block.
inline int64_t lane_of(const PackedLinear& linear, int64_t output, int64_t part) {
  if (!linear.is_gated) return output;
  return (output / LANES * PANEL_VECTORS + part) * LANES + output % LANES;
}

// Writes rows and bias to their places; the caller has zeroed the panels.
inline void pack(const PackedLinear& linear, const WeightRows& from) {
  const int64_t row_bytes = linear.inputs * linear.value_bytes();
  const int64_t panel_lanes = PANEL_VECTORS * LANES;
  in_parallel(from.count, [&](int64_t thread, int64_t threads) {
    const Span own = piece(from.count, thread, threads);
    for (int64_t row = own.first; row < own.last; row++) {
      const int64_t lane = lane_of(linear, from.first + row, from.part);
      const int64_t panel = from.block * linear.block_panels() + lane / panel_lanes;
      if (from.bias) linear.bias[panel * panel_lanes + lane % panel_lanes] = from.bias[row];
      uint8_t* to = linear.panels + panel * linear.panel_bytes() + lane % panel_lanes * 4;
      const uint8_t* weights = from.rows + row * from.stride;
      for (int64_t byte = 0; byte < row_bytes; byte += 4)
        std::memcpy(to + byte * panel_lanes, weights + byte, std::min<int64_t>(4, row_bytes - byte));
    }
  });
}

}  // namespace memplus
