// Matrix products of rows with packed weights (packed_linear.h):
//
//   out[t, o] = norm(x[t]) . weight[o] + bias[o]
//
// followed, while the sums are still in registers, by silu(gate) * up or the residual sum.
// The order of a sum depends only on its row. So an output is the same, bit for bit, in any batch.
#pragma once

#include <algorithm>

#include "group_tiles.h"
#include "kept.h"
#include "linear_call.h"
#include "linear_tiles.h"
#include "rms_norm.h"
#include "shared_work.h"
#include "weight_groups.h"

namespace memplus {

// rows per pass over a panel: enough that another pass costs little in comparison
constexpr int64_t CHUNK_ROWS = 4 * std::max<int64_t>(12, TILE_HEIGHT);
constexpr int64_t PIECES = 8;  // into which a thread splits its work

// The product with weights that are values like the inputs; a step is a word of each input row.
template <class Values>
struct ValueProduct {
#if defined(__AVX512F__)
  static constexpr int tile_rows = 12;  // times two vectors of outputs: 24 of 32 registers hold sums
#else
  static constexpr int tile_rows = 4;
#endif
  static constexpr int64_t fetched = 4096;  // prefetch distance in bytes, if one tile reads a panel

  // Computes the sums of COUNT rows, `stride` bytes apart, and one panel of outputs.
  template <int COUNT>
  static void multiply(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps,
                       Prefetch prefetch, floats (*sums)[PANEL_VECTORS]) {
    floats sum[COUNT][PANEL_VECTORS] = {};
    for (int64_t step = 0; step < steps; step++) {
      words weights[PANEL_VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < PANEL_VECTORS; v++)
        weights[v] = load<words>(panel + (step * PANEL_VECTORS + v) * sizeof(words));
      __builtin_prefetch(prefetch.at, 0, 2);
      __builtin_prefetch(prefetch.at + LINE, 0, 2);
      prefetch.at += prefetch.step;
#pragma GCC unroll 12
      for (int row = 0; row < COUNT; row++) {
        const words value = words{} + load<uint32_t>(x + row * stride + step * 4);
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; v++)
          sum[row][v] = Values::add_products(sum[row][v], weights[v], value);
      }
    }
    for (int row = 0; row < COUNT; row++)
      for (int v = 0; v < PANEL_VECTORS; v++) sums[row][v] = sum[row][v];
  }
};

template <class Product, int COUNT = Product::tile_rows>
inline void multiply_rows(int64_t count, const uint8_t* x, int64_t stride, const uint8_t* panel,
                          int64_t steps, Prefetch prefetch, floats (*sums)[PANEL_VECTORS]) {
  if constexpr (COUNT > 0) {
    if (count == COUNT)
      return Product::template multiply<COUNT>(x, stride, panel, steps, prefetch, sums);
    multiply_rows<Product, COUNT - 1>(count, x, stride, panel, steps, prefetch, sums);
  }
}

// Computes panels [panels.first, panels.last) of the outputs of `rows`.
template <class Values, class Product>
inline void run_panels(const LinearCall& call, Rows rows, Span panels) {
  const PackedLinear& linear = call.linear;
  constexpr int height = Product::tile_rows;
  const int64_t count = rows.last - rows.first, tiles = (count + height - 1) / height;
  const int64_t steps = linear.steps(), panel_bytes = linear.panel_bytes();
  floats sums[height][PANEL_VECTORS];
  for (int64_t panel = panels.first; panel < panels.last; panel++) {
    const uint8_t* weights = linear.panels + panel * panel_bytes;
    const int64_t block_at = panel / linear.block_panels() * linear.row_bytes();
    const PanelOutputs<Values> outputs(call, panel);
    // all tiles share the prefetch of the next panel, for which its first tile would wait
    const int64_t step_bytes = linear.step_bytes(), share = step_bytes / tiles;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const Span span = piece(count, tile, tiles);
      const uint8_t* x = rows.x + (rows.first + span.first) * rows.stride + block_at;
      Prefetch prefetch = {weights + panel_bytes + tile * share * steps, share};
      if (tiles == 1) prefetch = {weights + Product::fetched, step_bytes};
      multiply_rows<Product>(span.last - span.first, x, rows.stride, weights, steps, prefetch, sums);
      for (int64_t row = span.first; row < span.last; row++)
        outputs.write(rows.first + row, sums[row - span.first]);
      call.progress.mark();
    }
  }
}

// Writes one row of all blocks in the form that the kernels read: normalised if there is a norm, and
// padded with 0 to whole steps or rounded to groups.
template <class Values>
inline void prepare(const LinearCall& call, int64_t row, uint8_t* to) {
  const PackedLinear& linear = call.linear;
  const int64_t used = linear.inputs * Values::bytes, padded = linear.row_bytes();
  for (int64_t block = 0; block < linear.blocks; block++) {
    const uint8_t* from = call.x + row * call.x_stride + block * used;
    uint8_t* at = to + (row * linear.blocks + block) * padded;
    uint8_t* normed = linear.weight_bits ? kept_bytes<struct NormedRow>(used) : at;
    if (linear.norm_weights) {
      const int64_t which = block % linear.norm_rows;
      rms_norm<Values>(from, linear.norm_weights + which * used, linear.norm_eps, linear.inputs,
                       normed);
      from = normed;
    }
    if (linear.weight_bits) {
      round_row<Values>(from, linear, at);
      continue;
    }
    if (from != at) std::memcpy(at, from, used);
    std::memset(at + used, 0, padded - used);
  }
}

// Bytes of the rows that a call prepares; 0 if it reads its rows as they are.
template <class Values>
inline int64_t prepared_bytes(const LinearCall& call) {
  const PackedLinear& linear = call.linear;
  const bool is_whole = linear.row_bytes() == linear.inputs * Values::bytes;
  if (!linear.weight_bits && !linear.norm_weights && is_whole) return 0;
  return call.num_rows * linear.blocks * linear.row_bytes();
}

// Tiles serve the rows that fill one; sums of groups have the same bits without tiles.
template <class Values, class Product>
inline void run_groups(const LinearCall& call, Rows rows, Span panels) {
  if constexpr (has_tiles<Product>)
    if (rows.last - rows.first >= TILE_HEIGHT)
      return run_panels_by_tiles<Values, Product>(call, rows, panels);
  run_panels<Values, Product>(call, rows, panels);
}

template <class Values>
inline void run_some(const LinearCall& call, Rows rows, Span panels) {
  if (call.linear.weight_bits == 8)
    run_groups<Values, GroupProduct<8, false>>(call, rows, panels);
  else if (call.linear.has_minimums)
    run_groups<Values, GroupProduct<4, true>>(call, rows, panels);
  else if (call.linear.weight_bits == 4)
    run_groups<Values, GroupProduct<4, false>>(call, rows, panels);
  else if constexpr (has_tiles<ValueProduct<Values>>)
    run_panels_by_tiles<Values, ValueProduct<Values>>(call, rows, panels);
  else
    run_panels<Values, ValueProduct<Values>>(call, rows, panels);
}

// Runs one thread's share of a call; every thread of the team must call it. The team shares `work`
// and `prepared`, of prepared_bytes(). Outputs are complete after the team's next barrier.
template <class Values>
inline void run_share(const LinearCall& call, uint8_t* prepared, SharedWork& work, int64_t thread,
                      int64_t threads) {
  if (call.num_rows == 0) return;
  const PackedLinear& linear = call.linear;
  Rows rows = {call.x, call.x_stride, 0, call.num_rows};
  if (prepared_bytes<Values>(call)) {
    const Span own = piece(call.num_rows, thread, threads);
    for (int64_t row = own.first; row < own.last; row++) prepare<Values>(call, row, prepared);
    rows.x = prepared, rows.stride = linear.blocks * linear.row_bytes();
    barrier(threads);
  }
  const int64_t panels = linear.blocks * linear.block_panels();
  const int64_t chunks = (call.num_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
  const int64_t some = std::max<int64_t>(1, panels * chunks / (PIECES * threads));
  // a unit is a panel with all rows, so that weights are read once, unless panels are too few
  const bool has_whole_panels = some >= chunks;
  const int64_t parts = has_whole_panels ? 1 : chunks;
  work.give(panels * parts, thread, threads);
  for (;;) {
    const Span units = work.take(has_whole_panels ? some / chunks : some, thread);
    if (units.first == units.last) return;
    if (has_whole_panels) {
      run_some<Values>(call, rows, units);
      continue;
    }
    for (int64_t unit = units.first; unit < units.last; unit++) {
      const int64_t panel = unit / parts;
      const Span part = piece(call.num_rows, unit % parts, parts);
      rows.first = part.first, rows.last = part.last;
      run_some<Values>(call, rows, {panel, panel + 1});
    }
  }
}

template <class Values>
inline void run_linear(const LinearCall& call) {
  uint8_t* prepared = kept_bytes<struct Prepared>(prepared_bytes<Values>(call));
  SharedWork work(num_threads());
  const int64_t panels = call.linear.blocks * call.linear.block_panels();
  in_parallel(std::min(panels, work.size()), [&](int64_t thread, int64_t threads) {
    run_share<Values>(call, prepared, work, thread, threads);
  });
}

}  // namespace memplus
