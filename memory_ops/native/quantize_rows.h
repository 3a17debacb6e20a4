// Quantizes rows to records, bit-identical to row_formats.py.
#pragma once

#include <atomic>
#include <limits>

#include "row_table.h"
#include "threads.h"

namespace memplus {

constexpr int64_t GROUP_VALUES = Int4Row::group, BLOCK_VALUES = Int4Row::line_values;
constexpr int64_t BLOCK_WORDS = Int4Row::plane;
constexpr int32_t SIGN = (int32_t)0x80000000, INFINITE = 0x7f800000;
// adding a number of up to 2^22 rounds it, half to even, into the low bits
constexpr float ROUNDER = 12582912.0f;
constexpr float INT8_RANGE = 127.0f, FP8_RANGE = 448.0f;

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

// e4m3 codes of values up to 448: rounded half to even, below 2^-6 to whole multiples of 2^-9.
inline ints e4m3_codes(floats values) {
  const ints bits = (ints)values, size = bits & ~SIGN;
  const ints normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
  const floats unit = splat(16384.0f);  // whose last bit is 2^-9
  const ints small = (ints)((floats)size + unit) - (ints)unit;
  return (size < 0x3c800000 ? small : normal) | ((bits >> 24) & 0x80);
}

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

// A group's scale: the bf16 bits of its first value of largest magnitude, divided by -8. Values are
// divided by the rounded scale.
inline uint16_t group_scale(const float* values) {
  const int32_t most = largest_bits(values, GROUP_VALUES);
  int64_t at = 0;
  while ((load<int32_t>(values + at) & ~SIGN) != most) at++;
  return (uint16_t)round_to_bf16(splat(values[at] / -8))[0];
}

// The words and scales of one int4 block.
inline void quantize_block(const float* values, uint8_t* packed_words, uint8_t* packed_scales) {
  uint16_t scales[BLOCK_VALUES / GROUP_VALUES];
  for (int64_t group = 0; group * GROUP_VALUES < BLOCK_VALUES; group++)
    scales[group] = group_scale(values + group * GROUP_VALUES);
  std::memcpy(packed_scales, scales, sizeof scales);
  for (int64_t word = 0; word < BLOCK_WORDS; word += LANES) {
    words packed{};
    for (int64_t plane = 0; plane < BLOCK_VALUES / BLOCK_WORDS; plane++) {
      const uint16_t bits = scales[plane * BLOCK_WORDS / GROUP_VALUES];
      const float scale = float_of((int32_t)((uint32_t)bits << 16));
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

// Returns whether all values are finite; otherwise the record is not written.
template <class Row>
inline bool quantize_row(const Table& table, const uint8_t* from, const Records& into,
                         uint8_t* record) {
  int32_t most = 0;
  for_each_block<Row>(table, from, [&](const float* values, int64_t, int64_t) {
    most = std::max(most, largest_bits(values, BLOCK_VALUES));
  });
  if (most >= INFINITE) return false;
  std::memset(record, 0, (size_t)into.row_bytes);
  uint8_t* scales = record + into.scale_offset;
  if (into.format == INT4) {
    for_each_block<Row>(table, from, [&](const float* values, int64_t first, int64_t) {
      quantize_block(values, record + first / 2, scales + first / GROUP_VALUES * 2);
    });
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

// Returns the first row with a value that is not finite, or writes all records and returns -1.
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
