// Products with weights of 8 or 4 bits: groups of GROUP inputs with one fp16 scale per output, and a
// minimum if they have any. Rows are rounded to 8 bits in the same groups. The sum of a group is
// exact; sums of groups are fp32.
#pragma once

#include "memory_ops/native/simd.h"
#include "linear_call.h"
#include "values.h"

namespace memplus {

// The least largest value of a group that is rounded: 127 / value must be finite.
constexpr float SMALLEST_LARGEST = 0x1p-120f;

// Rounds one row. A NaN or infinity makes the scale of its group NaN. A group of values below
// SMALLEST_LARGEST becomes zeros.
template <class Values>
inline void round_row(const uint8_t* x, const PackedLinear& linear, RowGroup* to) {
  const int64_t size = linear.inputs;
  for (int64_t first = 0; first < size; first += GROUP, to++) {
    floats values[GROUP / LANES] = {};
    const int64_t count = std::min(size - first, GROUP);
    by_vectors(count, [&](int64_t v, int64_t at, int64_t lanes) {
      values[v] = Values::read(x + (first + at) * Values::bytes, lanes);
    });
    floats largest_lanes{}, zeros_or_nan{};
    for (floats value : values) {
      const floats magnitude = (floats)((words)value & 0x7fffffff);
      largest_lanes = largest_lanes < magnitude ? magnitude : largest_lanes;
      zeros_or_nan += value * 0.f;
    }
    const float largest_value = largest(largest_lanes), zero_or_nan = sum(zeros_or_nan);
    to->scale = largest_value / 127 + zero_or_nan;
    const bool is_rounded = zero_or_nan == 0 && largest_value >= SMALLEST_LARGEST;
    const floats factor = splat(is_rounded ? 127 / largest_value : 0.f);
    if (!is_rounded)
      for (floats& value : values) value = floats{};
    ints total{};
    for (int v = 0; v < GROUP / LANES; v++) {
      const ints rounded = to_nearest(values[v] * factor);
      store_i8(to->values + v * LANES, rounded);
      total += rounded;
    }
    int32_t row_sum = 0;
    for (int lane = 0; lane < LANES; lane++) row_sum += total[lane];
    if (linear.has_minimums)
      to->sum = to->scale * row_sum;
    else
      to->correction = -row_sum * (1 << (linear.weight_bits - 1));
  }
}

// Adds to each lane the products of its four unsigned bytes and its four signed bytes.
inline ints add_byte_products(ints sum, words weights, words values) {
#if defined(__AVX512VNNI__)
  return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)values);
#elif defined(__AVX512BW__)
  const __m512i low = _mm512_set1_epi16(0xff), x = (__m512i)values, w = (__m512i)weights;
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, low),
                                         _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return sum + (ints)even + (ints)odd;
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi16(0xff), x = (__m256i)values, w = (__m256i)weights;
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, low),
                                         _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return sum + (ints)even + (ints)odd;
#else
  for (int shift = 0; shift < 32; shift += 8)
    sum += (ints)(weights >> shift & 0xff) * ((ints)(values << (24 - shift)) >> 24);
  return sum;
#endif
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
