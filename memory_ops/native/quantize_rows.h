// Rows of floating-point values as records; see row_formats.py, whose bits these are.
#pragma once

#include <atomic>
#include <limits>
#include <vector>

#include "row_table.h"
#include "threads.h"

namespace memplus {

constexpr int64_t GROUP_VALUES = 32, BLOCK_VALUES = 128, BLOCK_WORDS = 16;
constexpr int32_t SIGN = (int32_t)0x80000000, INFINITE = 0x7f800000;
// a number of up to 2^22 that is added to it is rounded, half to even, and stands in the last bits
constexpr float ROUNDER = 12582912.0f;

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

// The bits of the largest value but for its sign: of finite numbers they order as these do.
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

// int8 and fp8. `values` are filled up with zeros to whole vectors.
inline void quantize_bytes(const float* values, int64_t count, int32_t most, const Records& into,
                           uint8_t* record) {
  const float range = into.format == INT8 ? 127.0f : 448.0f;
  const float scale = float_of(most) / range;
  std::memcpy(record + into.scale_offset, &scale, sizeof scale);
  if (scale == 0) return;
  for (int64_t at = 0; at < count; at += LANES) {
    const floats scaled = limited(load<floats>(values + at) / scale, range);
    const ints codes = into.format == INT8 ? rounded(scaled) : e4m3_codes(scaled);
    const narrow bytes = __builtin_convertvector(codes & 0xff, narrow);
    std::memcpy(record + at, &bytes, (size_t)std::min<int64_t>(LANES, count - at));
  }
}

// The bf16 bits of the first of the largest values, over -8: rounded before it is divided by.
inline uint16_t group_scale(const float* values) {
  const int32_t most = largest_bits(values, GROUP_VALUES);
  int64_t at = 0;
  while ((load<int32_t>(values + at) & ~SIGN) != most) at++;
  return (uint16_t)round_to_bf16(splat(values[at] / -8))[0];
}

// `values` are filled up with zeros to whole blocks.
inline void quantize_blocks(const float* values, int64_t count, const Records& into,
                            uint8_t* record) {
  for (int64_t block = 0; block * BLOCK_VALUES < count; block++, values += BLOCK_VALUES) {
    uint16_t scales[BLOCK_VALUES / GROUP_VALUES];
    for (int64_t word = 0; word < BLOCK_WORDS; word += LANES) {
      words packed{};
      for (int64_t plane = 0; plane < 8; plane++) {
        const int64_t group = plane / 2;
        if (word == 0 && plane % 2 == 0) scales[group] = group_scale(values + group * GROUP_VALUES);
        const float scale = float_of((int32_t)((uint32_t)scales[group] << 16));
        ints codes = splat(8);
        if (scale != 0) {
          const floats scaled = load<floats>(values + plane * BLOCK_WORDS + word) / scale;
          codes = limited(rounded(scaled) + 8, 0, 15);
        }
        packed |= (words)codes << (uint32_t)(4 * plane);
      }
      store(record + (block * BLOCK_WORDS + word) * 4, packed);
    }
    std::memcpy(record + into.scale_offset + block * (int64_t)sizeof scales, scales, sizeof scales);
  }
}

template <class Row>
inline void widen_row(const Table& table, const uint8_t* from, float* values) {
  const Row row(table, from, 0, 1);
  int64_t at = 0;
  for (; at + LANES <= table.value_dim; at += LANES) store(values + at, row.codes(at));
  if (at < table.value_dim) store(values + at, row.last_codes(at, table.value_dim - at));
}

// Returns the first row with a value that is not finite, or -1 where all records were written.
inline int64_t quantize_rows(const Table& table, const Records& into) {
  const int64_t blocks = (table.value_dim + BLOCK_VALUES - 1) / BLOCK_VALUES;
  std::atomic<int64_t> wrong{std::numeric_limits<int64_t>::max()};
  in_parallel(table.num_rows, [&](int64_t thread, int64_t threads) {
    const Span mine = piece(table.num_rows, thread, threads);
    std::vector<float> values(blocks * BLOCK_VALUES);
    for (int64_t row = mine.first; row < mine.last; row++) {
      with_row_type(table.format, [&](auto* row_type) {
        widen_row<std::remove_pointer_t<decltype(row_type)>>(table, table.row(row), values.data());
      });
      const int32_t most = largest_bits(values.data(), (int64_t)values.size());
      if (most >= INFINITE) {
        int64_t first = wrong;
        while (row < first && !wrong.compare_exchange_weak(first, row)) {
        }
        return;
      }
      uint8_t* record = into.data + row * into.row_bytes;
      std::memset(record, 0, (size_t)into.row_bytes);
      if (into.format == INT4)
        quantize_blocks(values.data(), table.value_dim, into, record);
      else
        quantize_bytes(values.data(), table.value_dim, most, into, record);
    }
  });
  return wrong == std::numeric_limits<int64_t>::max() ? -1 : (int64_t)wrong;
}

}  // namespace memplus
