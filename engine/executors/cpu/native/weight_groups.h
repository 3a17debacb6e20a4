// Products with weights of 8 or 4 bits: groups of GROUP inputs with one fp16 scale per output, and a
// minimum if they have any. Rows are rounded to 8 bits in the same groups. The sum of a group is
// exact; sums of groups are fp32.
#pragma once

#include "byte_products.h"
#include "linear_call.h"
#include "rounded_rows.h"
#include "values.h"

namespace memplus {

// Rounds one row by groups, as round_values does.
template <class Values>
inline void round_row(const uint8_t* x, const PackedLinear& linear, RowGroup* to) {
  const int64_t size = linear.inputs;
  for (int64_t first = 0; first < size; first += GROUP, to++) {
    floats values[GROUP / LANES] = {};
    by_vectors(std::min(size - first, GROUP), [&](int64_t v, int64_t at, int64_t lanes) {
      values[v] = Values::read(x + (first + at) * Values::bytes, lanes);
    });
    ints total{};
    to->scale = round_values(values, GROUP, 127, [&](int64_t at, int64_t, ints integers) {
      store_i8(to->values + at, integers);
      total += integers;
    });
    int32_t row_sum = 0;
    for (int lane = 0; lane < LANES; lane++) row_sum += total[lane];
    if (linear.has_minimums)
      to->sum = to->scale * row_sum;
    else
      to->correction = -row_sum * (1 << (linear.weight_bits - 1));
  }
}

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
        for (ints& one : products[row])
          one = HAS_MINIMUMS ? ints{} : splat(group[row]->correction);
      }
      add_group<COUNT>(panel + scale_bytes(HAS_MINIMUMS), group, products);
#pragma GCC unroll 2
      for (int v = 0; v < PANEL_VECTORS; v++) {
        const floats scales = load_fp16(panel + v * LANES * 2);
#pragma GCC unroll 6
        for (int row = 0; row < COUNT; row++)
          sum[row][v] += to_float(products[row][v]) * splat(group[row]->scale) * scales;
        if (!HAS_MINIMUMS) continue;
        const floats minimums = load_fp16(panel + SCALE_BYTES + v * LANES * 2);
#pragma GCC unroll 6
        for (int row = 0; row < COUNT; row++) sum[row][v] += splat(group[row]->sum) * minimums;
      }
    }
    for (int row = 0; row < COUNT; row++)
      for (int v = 0; v < PANEL_VECTORS; v++) sums[row][v] = sum[row][v];
  }

 private:
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
        for (int v = 0; v < PANEL_VECTORS; v++)
          bytes[v] = BITS == 8 ? packed[v] : packed[v] >> part * 4 & 0x0f0f0f0f;
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
