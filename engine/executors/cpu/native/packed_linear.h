// The weights of linear layers, laid out for linear.h. A panel is what PANEL_VECTORS vectors of
// outputs read: step by step over the inputs, for each output the 4 bytes of that step (two bf16
// values or one fp32), so that one load brings the weights of LANES outputs.
#pragma once

#include <algorithm>

#include "matrix_tiles.h"
#include "memory_ops/native/simd.h"
#include "memory_ops/native/threads.h"

namespace memplus {

constexpr int PANEL_VECTORS = 2;

// `blocks` products side by side, each of its own `inputs` values of a row, to `outputs` values.
struct PackedLinear {
  uint8_t* panels;              // [blocks, block_panels, steps, PANEL_VECTORS, LANES] of 4 bytes
  float* bias;                  // for each place in the panels, or null
  const uint8_t* norm_weights;  // [norm_rows, inputs], or null: row b % norm_rows for block b
  int64_t norm_rows;
  int64_t blocks, inputs, outputs;
  float norm_eps;
  int32_t is_bf16;           // or fp32
  int32_t is_gated;          // the vectors of a panel are the gate's and what it multiplies
  int32_t has_wide_outputs;  // fp32, whatever the inputs

  int64_t value_bytes() const { return is_bf16 ? 2 : 4; }
  int64_t steps() const {
    const int64_t used = (inputs * value_bytes() + 3) / 4;
    // for matrix tiles as many as they take at once
    return is_bf16 ? (used + TILE_STEPS - 1) / TILE_STEPS * TILE_STEPS : used;
  }
  int64_t panel_outputs() const { return is_gated ? LANES : PANEL_VECTORS * LANES; }
  int64_t block_panels() const { return (outputs + panel_outputs() - 1) / panel_outputs(); }
  int64_t panel_bytes() const { return steps() * PANEL_VECTORS * sizeof(words); }
};

// Rows of the weights of one block, `stride` bytes apart, which become its outputs `first` and
// following, in a gated one those of part 0 (the gate) or 1; and the bias of each, or null.
struct WeightRows {
  const uint8_t* rows;
  int64_t stride;
  const float* bias;
  int64_t count;
  int64_t block, first, part;
};

// The place of an output among the lanes of all panels of its block.
inline int64_t lane_of(const PackedLinear& linear, int64_t output, int64_t part) {
  if (!linear.is_gated) return output;
  return (output / LANES * PANEL_VECTORS + part) * LANES + output % LANES;
}

// Writes rows and bias to their places; the rest is the caller's to have zeroed.
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
