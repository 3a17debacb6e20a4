// Products with weights of 8 or 4 bits: groups of GROUP inputs with one fp16 scale per output, and a
// minimum if they have any. Rows are rounded in the same groups (row_groups.h). The sum of a group is
// exact; sums of groups are fp32.
#pragma once

#include <algorithm>
#include <optional>

#include "byte_products.h"
#include "linear_call.h"
#include "rms_norm.h"
#include "rounded_rows.h"
#include "row_groups.h"
#include "values.h"

namespace memplus {

inline void round_group(const floats* values, const PackedLinear& linear, RowGroup* to) {
  ints integers{};
  to->scale = round_values(values, GROUP, 127, [&](int64_t at, int64_t, ints rounded) {
    store_i8(to->values + at, rounded);
    integers += rounded;
  });
  if (linear.has_minimums)
    to->sum = to->scale * sum(integers);
  else
    to->correction = -sum(integers) * (1 << (linear.weight_bits - 1));
}

// Rounds one row by groups, as round_values does, without the outliers if the row keeps them.
template <class Values>
inline void round_row(const uint8_t* x, const PackedLinear& linear, uint8_t* to) {
  const int64_t size = linear.inputs;
  RowGroup* group = (RowGroup*)to;
  std::optional<OutlierList> outliers;
  if (linear.keeps_outliers())
    outliers.emplace(to, linear.steps(), mean_square<Values>(x, size));
  for (int64_t first = 0; first < size; first += GROUP, group++) {
    floats values[GROUP / LANES] = {};
    by_vectors(std::min(size - first, GROUP), [&](int64_t v, int64_t at, int64_t lanes) {
      values[v] = Values::read(x + (first + at) * Values::bytes, lanes);
    });
    round_group(values, linear, group);
    // all finite values are below 128 times the scale
    if (!outliers || !outliers->may_have(group->scale * 128)) continue;
    for (int64_t v = 0; v < GROUP / LANES; v++) outliers->take(values[v], first + v * LANES);
    round_group(values, linear, group);
  }
}

// The weights of one of the 8 / BITS parts of a group, a byte each, from words of the panel.
template <int BITS>
inline words unpacked(words packed, int part) {
  return BITS == 8 ? packed : packed >> part * 4 & 0x0f0f0f0f;
}

// Scales and minimums of a group of a panel.
template <bool HAS_MINIMUMS>
struct GroupScales {
  floats scales[PANEL_VECTORS], minimums[PANEL_VECTORS];

  explicit GroupScales(const uint8_t* panel) {
    for (int v = 0; v < PANEL_VECTORS; v++) {
      scales[v] = load_fp16(panel + v * LANES * 2);
      if (HAS_MINIMUMS) minimums[v] = load_fp16(panel + SCALE_BYTES + v * LANES * 2);
    }
  }

  // The integer from which the sum of the products of a row's group starts.
  static ints start(const RowGroup& group) {
    return HAS_MINIMUMS ? ints{} : splat(group.correction);
  }

  // Adds the sums of the products of a row's group to the sums of the row.
  void add(const RowGroup& group, const ints* products, floats* sums) const {
#pragma GCC unroll 2
    for (int v = 0; v < PANEL_VECTORS; v++) {
      sums[v] += to_float(products[v]) * splat(group.scale) * scales[v];
      if (HAS_MINIMUMS) sums[v] += splat(group.sum) * minimums[v];
    }
  }
};

// The product of linear.h with weights of BITS bits. A step is one group.
template <int BITS, bool HAS_MINIMUMS>
struct GroupProduct {
  // rows whose integer and fp32 sums for PANEL_VECTORS vectors of outputs fit in the registers
#if defined(__AVX512F__)
  static constexpr int tile_rows = 6;
#else
  static constexpr int tile_rows = 2;
#endif
  static constexpr int64_t fetched = 2048;  // prefetch distance in bytes, if one tile reads a panel
  static constexpr int64_t STEP_BYTES = group_bytes(BITS, HAS_MINIMUMS);
  using Scales = GroupScales<HAS_MINIMUMS>;

  template <int COUNT>
  static void multiply(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps,
                       Prefetch prefetch, floats (*sums)[PANEL_VECTORS]) {
    floats sum[COUNT][PANEL_VECTORS] = {};
    for (int64_t step = 0; step < steps; step++, panel += STEP_BYTES) {
      for (int64_t byte = 0; byte < prefetch.step; byte += LINE)
        __builtin_prefetch(prefetch.at + byte, 0, 2);
      prefetch.at += prefetch.step;
      const RowGroup* group[COUNT];
      ints products[COUNT][PANEL_VECTORS];
#pragma GCC unroll 6
      for (int row = 0; row < COUNT; row++) {
        group[row] = (const RowGroup*)(x + row * stride) + step;
        for (ints& one : products[row]) one = Scales::start(*group[row]);
      }
      add_group<COUNT>(panel + scale_bytes(HAS_MINIMUMS), group, products);
      const Scales scales(panel);
#pragma GCC unroll 6
      for (int row = 0; row < COUNT; row++) scales.add(*group[row], products[row], sum[row]);
    }
    for (int row = 0; row < COUNT; row++)
      for (int v = 0; v < PANEL_VECTORS; v++) sums[row][v] = sum[row][v];
    add_outliers(COUNT, x, stride, panel - steps * STEP_BYTES, steps, sums);
  }

  // Adds the products of the rows' outliers, if rows keep them.
  static void add_outliers(int64_t count, const uint8_t* x, int64_t stride, const uint8_t* panel,
                           int64_t steps, floats (*sums)[PANEL_VECTORS]) {
    if constexpr (BITS == 8)
      for (int64_t row = 0; row < count; row++)
        add_outliers(RowGroups(x + row * stride, steps), panel, sums[row]);
  }

 private:
  static void add_outliers(const RowGroups& row, const uint8_t* panel, floats* sums) {
    const Outlier* outliers = row.outliers();
    floats sum[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; v++) sum[v] = sums[v];
    for (int64_t i = 0, count = row.num_outliers(); i < count; i++) {
      const uint32_t input = outliers[i].input;
      const uint8_t *scales = panel + input / GROUP * STEP_BYTES, *weights = scales + SCALE_BYTES;
      // the product with a 1 for this input and zeros for the other three of a word
      const words is_input = words{} + (1u << input % 4 * 8);
      for (int v = 0; v < PANEL_VECTORS; v++) {
        const uint8_t* word = weights + (input % GROUP / 4 * PANEL_VECTORS + v) * sizeof(words);
        const ints weight = add_byte_products(splat(-128), load<words>(word), is_input);
        sum[v] += to_float(weight) * (load_fp16(scales + v * LANES * 2) * splat(outliers[i].value));
      }
    }
    for (int v = 0; v < PANEL_VECTORS; v++) sums[v] = sum[v];
  }

  template <int COUNT>
  static void add_group(const uint8_t* weights, const RowGroup* const* group,
                        ints (*products)[PANEL_VECTORS]) {
    constexpr int WORDS = GROUP * BITS / 32;  // per output
#pragma GCC unroll 8
    for (int word = 0; word < WORDS; word++) {
      words packed[PANEL_VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < PANEL_VECTORS; v++)
        packed[v] = load<words>(weights + (word * PANEL_VECTORS + v) * sizeof(words));
#pragma GCC unroll 2
      for (int part = 0; part < 8 / BITS; part++) {
        words bytes[PANEL_VECTORS];
        for (int v = 0; v < PANEL_VECTORS; v++) bytes[v] = unpacked<BITS>(packed[v], part);
#pragma GCC unroll 6
        for (int row = 0; row < COUNT; row++) {
          const int8_t* at = group[row]->values + (part * WORDS + word) * 4;
          const words values = words{} + load<uint32_t>(at);
#pragma GCC unroll 2
          for (int v = 0; v < PANEL_VECTORS; v++)
            products[row][v] = add_byte_products(products[row][v], bytes[v], values);
        }
      }
    }
  }
};

}  // namespace memplus
