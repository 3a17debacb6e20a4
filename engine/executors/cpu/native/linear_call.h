// The arguments and results of a product of linear.h.
#pragma once

#include <algorithm>

#include "memory_ops/native/simd.h"
#include "memory_ops/native/threads.h"
#include "packed_linear.h"
#include "progress.h"
#include "values.h"

namespace memplus {

// Rows times a linear layer. `residual` may be null or equal to `out`.
struct LinearCall {
  const PackedLinear& linear;
  const uint8_t* x;
  int64_t x_stride;  // in bytes
  int64_t num_rows;
  const uint8_t* residual;  // [T, outputs], as is `out`
  uint8_t* out;
  Progress progress;
};

// Rows [first, last) of a call, in the form that the tiles read.
struct Rows {
  const uint8_t* x;
  int64_t stride;
  int64_t first, last;
};

// The cache lines that a tile prefetches while it computes: into L2, because L1 tracks too few pending
// lines to keep the memory busy.
struct Prefetch {
  const uint8_t* at;
  int64_t step;  // bytes per step of the product
};

// Writes the sums of one panel.
template <class Values>
class PanelOutputs {
 public:
  PanelOutputs(const LinearCall& call, int64_t panel)
      : call_(call), vectors_(call.linear.is_gated ? 1 : PANEL_VECTORS) {
    const PackedLinear& linear = call.linear;
    const int64_t first = panel % linear.block_panels() * vectors_ * LANES;
    if (linear.bias) bias_ = linear.bias + panel * PANEL_VECTORS * LANES;
    row_values_ = linear.blocks * linear.outputs;
    at_ = panel / linear.block_panels() * linear.outputs + first;
    count_ = std::min<int64_t>(vectors_ * LANES, linear.outputs - first);
  }

  // Writes the sums of one row; changes `sums`.
  void write(int64_t row, floats* sums) const {
    if (bias_)
      for (int v = 0; v < PANEL_VECTORS; v++) sums[v] += load<floats>(bias_ + v * LANES);
    if (call_.linear.is_gated) sums[0] = silu(sums[0]) * sums[1];
    const int64_t at = row * row_values_ + at_;
    if (call_.linear.has_wide_outputs) {
      std::memcpy(call_.out + at * 4, sums, count_ * 4);
    } else if (count_ == PANEL_VECTORS * LANES) {
      write_vectors<PANEL_VECTORS>(at, sums);
    } else if (count_ == LANES) {
      write_vectors<1>(at, sums);
    } else {
      if (call_.residual) Values::add(sums, call_.residual + at * Values::bytes, count_);
      Values::write(call_.out + at * Values::bytes, sums, count_);
    }
  }

 private:
  template <int COUNT>
  void write_vectors(int64_t at, floats* sums) const {
    for (int v = 0; v < COUNT; v++) {
      const int64_t byte = (at + v * LANES) * Values::bytes;
      if (call_.residual) sums[v] += Values::widened(call_.residual + byte);
      Values::narrow(call_.out + byte, sums[v]);
    }
  }

  const LinearCall& call_;
  const int vectors_;
  const float* bias_ = nullptr;
  int64_t row_values_, at_, count_;
};

}  // namespace memplus
