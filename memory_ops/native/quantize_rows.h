// Quantizes rows to records, bit-identical to row_formats.py.
#pragma once

#include <atomic>
#include <limits>

#include "row_table.h"
#include "threads.h"

namespace memplus {

constexpr int64_t GROUP_VALUES = Int4Row::group, BLOCK_VALUES = Int4Row::line_values;
constexpr int64_t BLOCK_WORDS = Int4Row::plane, BLOCK_GROUPS = BLOCK_VALUES / GROUP_VALUES;
constexpr int32_t SIGN = (int32_t)0x80000000, INFINITE = 0x7f800000;
// adding a number of up to 2^22 rounds it, half to even, into the low bits
constexpr float ROUNDER = 12582912.0f;
constexpr float INT8_RANGE = 127.0f, FP8_RANGE = 448.0f;
// the bits of 8 * 65520, the least magnitude whose scale would be rounded to infinity
constexpr int32_t INT4_ROW_LIMIT = 0x48fff000;

struct Records {
  uint8_t* data;
  int64_t row_bytes;
  int64_t scale_offset;
  int32_t format;
};

typedef uint8_t narrow __attribute__((vector_size(LANES)));

inline ints rounded(floats values) { return (ints)(values + ROUNDER) - (ints)splat(ROUNDER); }
inline ints limited(ints values, int32_t least, int32_t most) {
  values = values < least ? splat(least) : values;
  return values > most ? splat(most) : values;
}
inline floats limited(floats values, float most) {
  values = values < -most ? splat(-most) : values;
  return values > most ? splat(most) : values;
}

// The bits of the largest magnitude: for finite numbers, bits order like magnitudes.
inline int32_t largest_bits(const float* values, int64_t count) {
  ints most{};
  for (int64_t at = 0; at < count; at += LANES)
    most = larger(most, load<ints>(values + at) & ~SIGN);
  int32_t all = 0;
  for (int lane = 0; lane < LANES; lane++) all = most[lane] > all ? most[lane] : all;
  return all;
}

inline float float_of(int32_t bits) { return load<float>(&bits); }

// The bits of values, which do not overflow, in a narrow floating format: rounded half to even.
template <int EXPONENT_BITS, int FRACTION_BITS>
inline ints narrow_bits(floats values) {
  constexpr int cut = 23 - FRACTION_BITS, bias = (1 << (EXPONENT_BITS - 1)) - 1;
  const ints bits = (ints)values, size = bits & ~SIGN;
  const ints kept = (size + ((1 << (cut - 1)) - 1) + ((size >> cut) & 1)) >> cut;
  const ints normal = kept - ((127 - bias) << FRACTION_BITS);
  // the power of two whose last bit is the format's smallest number
  const floats unit = splat(float_of((127 + 24 - bias - FRACTION_BITS) << 23));
  const ints small = (ints)((floats)size + unit) - (ints)unit;
  constexpr int32_t least_normal = (128 - bias) << 23;
  const ints sign = (bits >> (31 - EXPONENT_BITS - FRACTION_BITS)) &
                    (1 << (EXPONENT_BITS + FRACTION_BITS));
  return (size < least_normal ? small : normal) | sign;
}

inline ints e4m3_codes(floats values) { return narrow_bits<4, 3>(values); }
inline ints fp16_bits(floats values) { return narrow_bits<5, 10>(values); }

// int8 or fp8 codes of some values, which zeros pad to whole vectors.
inline void quantize_bytes(const float* values, int64_t count, float scale, int32_t format,
                           uint8_t* codes) {
  const float range = format == INT8 ? INT8_RANGE : FP8_RANGE;
  for (int64_t at = 0; at < count; at += LANES) {
    const floats scaled = limited(load<floats>(values + at) / scale, range);
    const ints numbers = format == INT8 ? rounded(scaled) : e4m3_codes(scaled);
    const narrow bytes = __builtin_convertvector(numbers & 0xff, narrow);
    std::memcpy(codes + at, &bytes, (size_t)std::min<int64_t>(LANES, count - at));
  }
}

// The first value whose magnitude has the bits `most`; one of them does.
inline float first_of_size(const float* values, int32_t most) {
  while ((load<int32_t>(values) & ~SIGN) != most) values++;
  return *values;
}

// A group's scale: the bf16 bits of its first value of largest magnitude, divided by -8. Values are
// divided by the rounded scale.
inline uint16_t group_scale(const float* values) {
  const float largest = first_of_size(values, largest_bits(values, GROUP_VALUES));
  return (uint16_t)round_to_bf16(splat(largest / -8))[0];
}

// The words of one int4 block, from the scales of its groups.
inline void quantize_block(const float* values, const float* scales, uint8_t* packed_words) {
  for (int64_t word = 0; word < BLOCK_WORDS; word += LANES) {
    words packed{};
    for (int64_t plane = 0; plane < BLOCK_VALUES / BLOCK_WORDS; plane++) {
      const float scale = scales[plane * BLOCK_WORDS / GROUP_VALUES];
      ints codes = splat(8);
      if (scale != 0) {
        const floats scaled = load<floats>(values + plane * BLOCK_WORDS + word) / scale;
        codes = limited(rounded(scaled) + 8, 0, 15);
      }
      packed |= (words)codes << (uint32_t)(4 * plane);
    }
    store(packed_words + word * 4, packed);
  }
}

// Calls `body(values, at, count)` for each block of the row, padded with zeros.
template <class Row, class Body>
inline void for_each_block(const Table& table, const uint8_t* from, Body body) {
  for (int64_t first = 0; first < table.value_dim; first += BLOCK_VALUES) {
    const int64_t count = std::min(BLOCK_VALUES, table.value_dim - first);
    float values[BLOCK_VALUES] = {};
    for (int64_t at = 0; at < count; at += Row::line_values) {
      const auto factors = Row::factors(scales_of<Row>(table, from, first + at), 1);
      const Row row(from, first + at, factors);
      const int64_t columns = std::min(Row::line_values, count - at);
      int64_t offset = 0;
      for (; offset + LANES <= columns; offset += LANES)
        store(values + at + offset, row.codes(offset));
      if (offset < columns) store(values + at + offset, row.last_codes(offset, columns - offset));
    }
    body(values, first, count);
  }
}

// Words and scales of a record of int4 groups.
template <class Row>
inline void quantize_groups(const Table& table, const uint8_t* from, uint8_t* words,
                            uint8_t* scales) {
  for_each_block<Row>(table, from, [&](const float* values, int64_t first, int64_t) {
    uint16_t bits[BLOCK_GROUPS];
    float factors[BLOCK_GROUPS];
    for (int64_t group = 0; group < BLOCK_GROUPS; group++) {
      bits[group] = group_scale(values + group * GROUP_VALUES);
      factors[group] = float_of((int32_t)((uint32_t)bits[group] << 16));
    }
    std::memcpy(scales + first / GROUP_VALUES * 2, bits, sizeof bits);
    quantize_block(values, factors, words + first / 2);
  });
}

// The same with one fp16 scale for the row. `most` has the bits of its largest magnitude.
template <class Row>
inline void quantize_whole_row(const Table& table, const uint8_t* from, int32_t most,
                               uint8_t* words, uint8_t* scale) {
  float largest = 0;
  bool found = false;
  for_each_block<Row>(table, from, [&](const float* values, int64_t, int64_t) {
    if (found || largest_bits(values, BLOCK_VALUES) != most) return;
    largest = first_of_size(values, most);
    found = true;
  });
  const uint16_t bits = (uint16_t)fp16_bits(splat(largest / -8))[0];
  std::memcpy(scale, &bits, sizeof bits);
  float factors[BLOCK_GROUPS];
  std::fill(factors, factors + BLOCK_GROUPS, Int4RowScaled::factors(scale, 1));
  for_each_block<Row>(table, from, [&](const float* values, int64_t first, int64_t) {
    quantize_block(values, factors, words + first / 2);
  });
}

// Returns whether the format holds all values; otherwise the record is not written.
template <class Row>
inline bool quantize_row(const Table& table, const uint8_t* from, const Records& into,
                         uint8_t* record) {
  int32_t most = 0;
  for_each_block<Row>(table, from, [&](const float* values, int64_t, int64_t) {
    most = std::max(most, largest_bits(values, BLOCK_VALUES));
  });
  if (most >= (into.format == INT4_ROW ? INT4_ROW_LIMIT : INFINITE)) return false;
  std::memset(record, 0, (size_t)into.row_bytes);
  uint8_t* scales = record + into.scale_offset;
  if (into.format == INT4) {
    quantize_groups<Row>(table, from, record, scales);
    return true;
  }
  if (into.format == INT4_ROW) {
    quantize_whole_row<Row>(table, from, most, record, scales);
    return true;
  }
  const float scale = float_of(most) / (into.format == INT8 ? INT8_RANGE : FP8_RANGE);
  std::memcpy(scales, &scale, sizeof scale);
  if (scale == 0) return true;
  for_each_block<Row>(table, from, [&](const float* values, int64_t first, int64_t count) {
    quantize_bytes(values, count, scale, into.format, record + first);
  });
  return true;
}

// Returns the first row that the format cannot hold, or writes all records and returns -1.
inline int64_t quantize_rows(const Table& table, const Records& into) {
  constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> wrong{none};
  in_parallel(table.num_rows, [&](int64_t thread, int64_t threads) {
    const Span mine = piece(table.num_rows, thread, threads);
    with_row_type(table.format, [&](auto* row_type) {
      using Row = std::remove_pointer_t<decltype(row_type)>;
      for (int64_t row = mine.first; row < mine.last; row++) {
        if (quantize_row<Row>(table, table.row(row), into, into.data + row * into.row_bytes))
          continue;
        int64_t first = wrong;
        while (row < first && !wrong.compare_exchange_weak(first, row)) {
        }
        return;
      }
    });
  });
  return wrong == none ? -1 : (int64_t)wrong;
}

}  // namespace memplus
