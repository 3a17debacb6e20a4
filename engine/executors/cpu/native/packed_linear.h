// The weights of linear layers in the layout of linear.h. A panel holds the weights of
// PANEL_VECTORS vectors of outputs: step by step over the inputs, for each output the 4 bytes of
// that step (two bf16 values or one fp32), so that one load reads weights of LANES outputs.
//
// Weights of fewer bits come in groups of GROUP inputs, a step each: fp16 scales of the outputs, their
// fp16 minimums if they have any, then for each output 4 bytes at a time. A byte holds the weight of
// one input (8 bits), or those of inputs i and i + GROUP / 2 of the group (4 bits), with an offset that
// makes it unsigned. Weights with minimums are unsigned already. Vectors and tiles read both layouts.
#pragma once

#include <algorithm>

#include "matrix_tiles.h"
#include "memory_ops/native/simd.h"
#include "memory_ops/native/threads.h"
#include "row_groups.h"

namespace memplus {

constexpr int PANEL_VECTORS = 2;
constexpr int64_t SCALE_BYTES = PANEL_VECTORS * LANES * 2;

// Bytes of the scales of one group of a panel, and of its minimums.
constexpr int64_t scale_bytes(bool has_minimums) { return SCALE_BYTES * (has_minimums ? 2 : 1); }

// Bytes of one group of a panel.
constexpr int64_t group_bytes(int bits, bool has_minimums) {
  return scale_bytes(has_minimums) + PANEL_VECTORS * LANES * GROUP * bits / 8;
}

// A product of `blocks` blocks; each maps its own `inputs` values of a row to `outputs` values.
struct PackedLinear {
  uint8_t* panels;              // [blocks, block_panels, steps] of step_bytes()
  float* bias;                  // one per place in the panels, or null
  const uint8_t* norm_weights;  // [norm_rows, inputs], or null: row b % norm_rows for block b
  int64_t norm_rows;
  int64_t blocks, inputs, outputs;
  float norm_eps;
  int32_t is_bf16;           // inputs and outputs; else fp32
  int32_t weight_bits;       // 8 or 4: groups with scales; 0: weights are values like the inputs
  int32_t has_minimums;      // of groups
  int32_t is_gated;          // a panel has vectors of the gate and of its factor
  int32_t has_wide_outputs;  // fp32 outputs for any inputs

  int64_t value_bytes() const { return is_bf16 ? 2 : 4; }
  int64_t steps() const {
    if (weight_bits) return (inputs + GROUP - 1) / GROUP;
    const int64_t used = (inputs * value_bytes() + 3) / 4;
    // matrix tiles read whole tiles of steps
    return is_bf16 ? (used + TILE_STEPS - 1) / TILE_STEPS * TILE_STEPS : used;
  }
  // Bytes of a row of inputs of one block, in the form that the kernels read.
  int64_t row_bytes() const {
    return weight_bits ? RowGroups::bytes(steps(), keeps_outliers()) : steps() * 4;
  }
  // Whether outliers of the inputs are kept: only for 8-bit weights, since errors of 4-bit weights are
  // larger than those of rounded outliers.
  bool keeps_outliers() const { return weight_bits == 8; }
  int64_t step_bytes() const {
    return weight_bits ? group_bytes(weight_bits, has_minimums) : PANEL_VECTORS * sizeof(words);
  }
  int64_t panel_outputs() const { return is_gated ? LANES : PANEL_VECTORS * LANES; }
  int64_t block_panels() const { return (outputs + panel_outputs() - 1) / panel_outputs(); }
  int64_t panel_bytes() const { return steps() * step_bytes(); }
};

// Rows of the weights of one block, `stride` bytes apart, for its outputs from `first` on, and their
// bias or null; if the weights are in groups, these, their fp16 scales [count, steps] and their
// minimums of the same shape, or null, are contiguous. In a gated block, part 0 is the gate and part 1 its factor.
struct WeightRows {
  const uint8_t* rows;
  int64_t stride;
  const uint8_t *scales, *minimums;
  const float* bias;
  int64_t count;
  int64_t block, first, part;
};

// The index of an output among the lanes of all panels of its block.
inline int64_t lane_of(const PackedLinear& linear, int64_t output, int64_t part) {
  if (!linear.is_gated) return output;
  return (output / LANES * PANEL_VECTORS + part) * LANES + output % LANES;
}

// Writes the groups of one row of weights, int8 or nibbles, to a lane of a panel.
inline void pack_groups(const PackedLinear& linear, const WeightRows& from, int64_t row, int64_t lane,
                        uint8_t* panel) {
  const int64_t words_of_row = GROUP * linear.weight_bits / 32, first = row * linear.steps() * 2;
  const uint32_t sign_bits = linear.weight_bits == 8 ? 0x80808080 : 0;  // flips int8 to offset 128
  const uint8_t* weights = from.rows + row * from.stride;
  for (int64_t step = 0; step < linear.steps(); step++, panel += linear.step_bytes()) {
    std::memcpy(panel + lane * 2, from.scales + first + step * 2, 2);
    if (linear.has_minimums)
      std::memcpy(panel + SCALE_BYTES + lane * 2, from.minimums + first + step * 2, 2);
    uint8_t* to = panel + scale_bytes(linear.has_minimums) + lane * 4;
    for (int64_t word = 0; word < words_of_row; word++, weights += 4)
      store(to + word * PANEL_VECTORS * sizeof(words), load<uint32_t>(weights) ^ sign_bits);
  }
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
      uint8_t* to = linear.panels + panel * linear.panel_bytes();
      if (linear.weight_bits) {
        pack_groups(linear, from, row, lane % panel_lanes, to);
        continue;
      }
      const uint8_t* weights = from.rows + row * from.stride;
      to += lane % panel_lanes * 4;
      for (int64_t byte = 0; byte < row_bytes; byte += 4)
        std::memcpy(to + byte * panel_lanes, weights + byte, std::min<int64_t>(4, row_bytes - byte));
    }
  });
}

}  // namespace memplus
