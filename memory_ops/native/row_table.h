// Value tables as the kernels see them, with readers of a row's values for each format.
#pragma once

#include <algorithm>

#include "simd.h"

namespace memplus {

// the codes of backend.py
enum Format : int32_t { FP32, FP16, BF16, INT8, FP8, INT4 };

struct Table {
  const uint8_t* data;
  int64_t num_rows;
  int64_t row_stride;    // in bytes
  int64_t value_dim;     // V
  int64_t scale_offset;  // bytes of a record before its scales; plain rows have none
  int32_t format;

  const uint8_t* row(int64_t id) const { return data + id * row_stride; }
};

// Interface of all formats: a reader of one row from column `at` on, a multiple of line_values. The
// LANES values at `offset` columns after it, a multiple of LANES, are codes(offset) times
// factor(offset), which includes the weight. `line_values` values fill one cache line. If
// `in_halves`, even_codes and odd_codes read the next 2 * LANES values faster than codes does.

template <class Row, int BYTES>
struct PlainRow {
  static constexpr bool in_halves = false;
  static constexpr int64_t line_values = LINE / BYTES;

  PlainRow(const Table&, const uint8_t* row, int64_t at, float weight)
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
  static constexpr bool in_halves = false;
  static constexpr int64_t line_values = LINE;

  ByteRow(const Table& table, const uint8_t* row, int64_t at, float weight)
      : values_(row + at),
        factor_(splat(weight * Row::unit * load<float>(row + table.scale_offset))) {}
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
struct Int4Row {
  static constexpr bool in_halves = false;
  static constexpr int64_t line_values = 2 * LINE;
  static constexpr int64_t plane = 16;  // values in the same bits of a block
  static constexpr int64_t group = 32;  // values that share a scale

  Int4Row(const Table& table, const uint8_t* row, int64_t at, float weight)
      : block_(row + at / line_values * LINE) {
    typedef uint16_t halves __attribute__((vector_size(8)));
    typedef uint32_t quad __attribute__((vector_size(16)));
    typedef float factors __attribute__((vector_size(16)));
    const uint8_t* scales = row + table.scale_offset + at / line_values * 8;
    store(factors_, (factors)(__builtin_convertvector(load<halves>(scales), quad) << 16) * weight);
    // force the factors into memory: a broadcast load costs nothing
    asm("" : "+m"(factors_));
  }
  floats codes(int64_t offset) const {
    const int bits = (int)(offset / plane * 4);
    const words shifted = load<words>(block_ + offset % plane * 4) >> bits;
#if defined(__AVX512F__)
    // the permutation uses only the lowest four bits
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (floats)_mm512_permutexvar_ps((__m512i)shifted, values);
#else
    return to_float((ints)(shifted & 15) - 8);
#endif
  }
  floats last_codes(int64_t offset, int64_t) const { return codes(offset); }
  floats factor(int64_t offset) const { return splat(factors_[offset / group]); }

 private:
  const uint8_t* block_;
  float factors_[4];
};

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
