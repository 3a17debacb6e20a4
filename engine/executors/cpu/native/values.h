// Reads, writes and multiplies fp32 and bf16 values, four bytes at a time.
#pragma once

#include <algorithm>
#include <utility>

#include "memory_ops/native/simd.h"

namespace memplus {

// Calls `body(vector, at, lanes)` for `count` values in vectors of LANES; the last may be shorter.
template <class Body>
inline void by_vectors(int64_t count, Body body) {
  for (int64_t at = 0; at < count; at += LANES)
    body(at / LANES, at, count - at < LANES ? count - at : (int64_t)LANES);
}

template <class Values>
struct Vectors {
  using Sums = floats;

  // `lanes` values, padded with zeros
  static floats read(const uint8_t* at, int64_t lanes) {
    if (lanes == LANES) return Values::widened(at);
    uint8_t last[LANES * 4] = {};
    std::memcpy(last, at, lanes * Values::bytes);
    return Values::widened(last);
  }

  static void write(uint8_t* at, floats values, int64_t lanes) {
    if (lanes == LANES) return Values::narrow(at, values);
    uint8_t last[LANES * 4];
    Values::narrow(last, values);
    std::memcpy(at, last, lanes * Values::bytes);
  }

  static void add(floats* sums, const uint8_t* from, int64_t count) {
    by_vectors(count, [&](int64_t v, int64_t at, int64_t lanes) {
      sums[v] += read(from + at * Values::bytes, lanes);
    });
  }

  static void write(uint8_t* to, const floats* sums, int64_t count) {
    by_vectors(count, [&](int64_t v, int64_t at, int64_t lanes) {
      write(to + at * Values::bytes, sums[v], lanes);
    });
  }
};

struct Fp32Values : Vectors<Fp32Values> {
  static constexpr int64_t bytes = 4;
  static constexpr bool has_pairs = false;
  static floats widened(const uint8_t* at) { return load<floats>(at); }
  static void narrow(uint8_t* at, floats values) { store(at, values); }
  static floats rounded(floats values) { return values; }
  // LANES words of one row, as one factor of a product
  static words together(const uint8_t* const* rows, int64_t at, int64_t lanes) {
    return (words)read(rows[0] + at * bytes, lanes);
  }

  static floats add_products(floats sum, words a, words b) { return sum + (floats)a * (floats)b; }
};

struct Bf16Values : Vectors<Bf16Values> {
  static constexpr int64_t bytes = 2;
#if defined(__AVX512BW__)
  // Pairs 2 LANES values of two rows, alternating between the two vectors every four values, which
  // is cheaper than keeping the order; in_order() restores it in vectors of sums.
  static constexpr bool has_pairs = true;
  static void pair(const uint8_t* a, const uint8_t* b, floats* to) {
    const __m512i first = load<__m512i>(a), second = load<__m512i>(b);
    to[0] = (floats)_mm512_unpacklo_epi16(first, second);
    to[1] = (floats)_mm512_unpackhi_epi16(first, second);
  }
  static void in_order(floats* sums) {
    const ints low = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
    const floats first = sums[0];
    sums[0] = __builtin_shuffle(first, sums[1], low);
    sums[1] = __builtin_shuffle(first, sums[1], low + 8);
  }
#else
  static constexpr bool has_pairs = false;
#endif
  static floats widened(const uint8_t* at) { return load_bf16(at); }
  static void narrow(uint8_t* at, floats values) { store_bf16(at, values); }
  static floats rounded(floats values) { return (floats)(round_to_bf16(values) << 16); }
  // LANES words of two rows, in pairs, as one factor of a product
  static words together(const uint8_t* const* rows, int64_t at, int64_t lanes) {
    const words low = (words)read(rows[0] + at * bytes, lanes);
    return (low >> 16) | (words)read(rows[1] + at * bytes, lanes);
  }

  // adds the products of both values of each lane
  static floats add_products(floats sum, words a, words b) {
#if defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (floats)(a << 16) * (floats)(b << 16);
    return sum + (floats)(a & 0xffff0000) * (floats)(b & 0xffff0000);
#endif
  }
};

}  // namespace memplus
