// Value tables as the kernels see them, with readers of a row's values for each format.
#pragma once

#include <algorithm>

#include "simd.h"

namespace memplus {

// the codes of backend.py
enum Format : int32_t { FP32, FP16, BF16, INT8, FP8, INT4, INT4_ROW };

struct Table {
  const uint8_t* data;
  int64_t num_rows;
  int64_t row_stride;    // in bytes
  int64_t value_dim;     // V
  int64_t scale_offset;  // bytes of a record before its scales; plain rows have none
  int32_t format;

  const uint8_t* row(int64_t id) const { return data + id * row_stride; }
};

// Interface of all formats: a reader of a row's columns from `at` on, which is a multiple of
// line_values, or of the number of columns that are read. The LANES values at `offset` columns
// after it, a multiple of LANES, are codes(offset) times factor(offset). Factors are a weight times
// the scales of `scaled_values` columns; a reader refers to those that it is given. `line_values`
// values fill one cache line. If `in_halves`, even_codes and odd_codes read the next 2 * LANES
// values faster than codes does.

constexpr int64_t ALL_VALUES = INT64_MAX;

template <class Row, int BYTES>
struct PlainRow {
  typedef float Factors;
  static constexpr bool in_halves = false;
  static constexpr int64_t line_values = LINE / BYTES, scaled_values = ALL_VALUES;

  static Factors factors(const uint8_t*, float weight) { return weight; }

  PlainRow(const uint8_t* row, int64_t at, const Factors& weight)
      : values_(row + at * BYTES), factor_(splat(weight)) {}
  floats codes(int64_t offset) const { return Row::widened(values_ + offset * BYTES); }
  // the last `count` values of a row; the memory after them may not be readable
  floats last_codes(int64_t offset, int64_t count) const {
    uint8_t copy[LANES * BYTES] = {};
    std::memcpy(copy, values_ + offset * BYTES, count * BYTES);
    return Row::widened(copy);
  }
  floats factor(int64_t) const { return factor_; }

 protected:
  const uint8_t* values_;

 private:
  floats factor_;
};

struct Fp32Row : PlainRow<Fp32Row, 4> {
  using PlainRow::PlainRow;
  static floats widened(const uint8_t* at) { return load<floats>(at); }
};

struct Fp16Row : PlainRow<Fp16Row, 2> {
  using PlainRow::PlainRow;
  static floats widened(const uint8_t* at) { return load_fp16(at); }
};

struct Bf16Row : PlainRow<Bf16Row, 2> {
  using PlainRow::PlainRow;
  // a word holds two values: both cost one load, a shift and a mask
  static constexpr bool in_halves = true;
  static floats widened(const uint8_t* at) { return load_bf16(at); }
  floats even_codes(int64_t offset) const { return (floats)(both(offset) << 16); }
  floats odd_codes(int64_t offset) const { return (floats)(both(offset) & 0xffff0000); }

 private:
  words both(int64_t offset) const { return load<words>(values_ + offset * 2); }
};

// One byte per value and one scale; records have enough bytes after the last value for full loads.
template <class Row>
struct ByteRow {
  typedef float Factors;
  static constexpr bool in_halves = false;
  static constexpr int64_t line_values = LINE, scaled_values = ALL_VALUES;

  static Factors factors(const uint8_t* scale, float weight) {
    return weight * Row::unit * load<float>(scale);
  }

  ByteRow(const uint8_t* row, int64_t at, const Factors& factor)
      : values_(row + at), factor_(splat(factor)) {}
  floats codes(int64_t offset) const { return Row::widened(values_ + offset); }
  floats last_codes(int64_t offset, int64_t) const { return codes(offset); }
  floats factor(int64_t) const { return factor_; }

 private:
  const uint8_t* values_;
  floats factor_;
};

struct Int8Row : ByteRow<Int8Row> {
  using ByteRow::ByteRow;
  static constexpr float unit = 1;
  static floats widened(const uint8_t* at) { return to_float(load_i8(at)); }
};

struct Fp8Row : ByteRow<Fp8Row> {
  using ByteRow::ByteRow;
  static constexpr float unit = 256;
  static floats widened(const uint8_t* at) { return load_fp8(at); }
};

// Blocks of 128 values: 16 words, in which bits 4 p to 4 p + 3 are values 16 p to 16 p + 15.
struct Int4Codes {
  static constexpr bool in_halves = false;
  static constexpr int64_t line_values = 2 * LINE;
  static constexpr int64_t plane = 16;  // values in the same bits of a block

  Int4Codes(const uint8_t* row, uint64_t at)
      : words_(row + at / line_values * LINE + at % plane * 4),
        bits_((int)(at % line_values / plane * 4)) {}
  floats codes(int64_t offset) const {
    const words unshifted = load<words>(words_ + offset % plane * 4);
    const words shifted = unshifted >> bits_ >> (int)(offset / plane * 4);
#if defined(__AVX512F__)
    // the permutation uses only the lowest four bits
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (floats)_mm512_permutexvar_ps((__m512i)shifted, values);
#else
    return to_float((ints)(shifted & 15) - 8);
#endif
  }
  floats last_codes(int64_t offset, int64_t) const { return codes(offset); }

 private:
  const uint8_t* words_;
  int bits_;
};

// One bf16 scale for each group.
struct Int4Row : Int4Codes {
  static constexpr int64_t group = 32;  // values that share a scale
  static constexpr int64_t scaled_values = LINE / 2 * group;  // whose scales fill a line

  struct Factors {
    float of[scaled_values / group];
  };

  static Factors factors(const uint8_t* scales, float weight) {
    Factors factors;
    for (int64_t at = 0; at < scaled_values / group; at += LANES)
      store(factors.of + at, load_bf16(scales + at * 2) * weight);
    return factors;
  }

  Int4Row(const uint8_t* row, uint64_t at, const Factors& factors)
      : Int4Codes(row, at), factors_(factors.of + at % scaled_values / group) {}
  const float& factor(int64_t offset) const { return factors_[offset / group]; }

 private:
  const float* factors_;
};

// One fp16 scale for the row, in a cache line that has no other data.
struct Int4RowScaled : Int4Codes {
  typedef float Factors;
  static constexpr int64_t scaled_values = ALL_VALUES;

  static Factors factors(const uint8_t* scale, float weight) {
    return weight * load_fp16(scale)[0];
  }

  Int4RowScaled(const uint8_t* row, uint64_t at, const Factors& factor)
      : Int4Codes(row, at), factor_(splat(factor)) {}
  floats factor(int64_t) const { return factor_; }

 private:
  floats factor_;
};

// The scales of the `scaled_values` columns of a row that `at` is one of.
template <class Row>
inline const uint8_t* scales_of(const Table& table, const uint8_t* row, int64_t at) {
  return row + table.scale_offset + at / Row::scaled_values * LINE;
}

// Calls `body` with a null pointer to the row type of `format`.
template <class Body>
inline void with_row_type(int32_t format, Body body) {
  switch (format) {
    case FP32: return body((Fp32Row*)nullptr);
    case FP16: return body((Fp16Row*)nullptr);
    case BF16: return body((Bf16Row*)nullptr);
    case INT8: return body((Int8Row*)nullptr);
    case FP8: return body((Fp8Row*)nullptr);
    case INT4: return body((Int4Row*)nullptr);
    case INT4_ROW: return body((Int4RowScaled*)nullptr);
  }
}

// The index of the first row id outside the table, or -1.
inline int64_t first_outside(const Table& table, const int64_t* ids, int64_t count) {
  const auto is_outside = [&](int64_t id) { return (uint64_t)id >= (uint64_t)table.num_rows; };
  // without an early exit the compiler vectorises this loop
  bool outside = false;
  for (int64_t at = 0; at < count; at++) outside |= is_outside(ids[at]);
  return outside ? std::find_if(ids, ids + count, is_outside) - ids : -1;
}

}  // namespace memplus
