// SIMD vectors in the compiler's vector types: compiler flags turn the same source into AVX-512,
// AVX2 or portable code. Intrinsics are used only if these types lack the operation, or if the
// compiler would otherwise process lane by lane.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace memplus {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int LINE = 64;  // bytes of a cache line

typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int64_t longs __attribute__((vector_size(LANES * 4)));  // half as many lanes

template <class Vector>
inline Vector load(const void* at) {
  Vector value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <class Vector>
inline void store(void* at, Vector value) {
  std::memcpy(at, &value, sizeof value);
}

// subtracting zero, unlike adding it, changes no number, so the compiler omits it
inline floats splat(float value) { return value - floats{}; }
inline ints splat(int32_t value) { return value - ints{}; }

// 0, 1, 2, ...
inline ints lane_numbers() {
  ints lanes{};
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
  return lanes;
}

inline float sum(floats lanes) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
  return total;
}

inline float largest(floats lanes) {
  float most = lanes[0];
  for (int lane = 1; lane < LANES; lane++) most = lanes[lane] > most ? lanes[lane] : most;
  return most;
}

inline floats square_root(floats numbers) {
#if defined(__AVX512F__)
  return (floats)_mm512_sqrt_ps((__m512)numbers);
#elif defined(__AVX2__)
  return (floats)_mm256_sqrt_ps((__m256)numbers);
#else
  for (int lane = 0; lane < LANES; lane++) numbers[lane] = __builtin_sqrtf(numbers[lane]);
  return numbers;
#endif
}

inline floats to_float(ints numbers) {
#if defined(__AVX512F__)
  return (floats)_mm512_cvtepi32_ps((__m512i)numbers);
#else
  return __builtin_convertvector(numbers, floats);
#endif
}

// The nearest integers, ties to even.
inline ints to_nearest(floats numbers) {
#if defined(__AVX512F__)
  return (ints)_mm512_cvtps_epi32((__m512)numbers);
#elif defined(__AVX2__)
  return (ints)_mm256_cvtps_epi32((__m256)numbers);
#else
  ints nearest{};
  for (int lane = 0; lane < LANES; lane++) nearest[lane] = (int32_t)__builtin_rintf(numbers[lane]);
  return nearest;
#endif
}

// Deinterleave two adjacent vectors into even and odd lanes, and interleave them again.

inline void part_lanes(floats& first, floats& second) {
  const ints even = lane_numbers() * 2;
  const floats whole = first;
  first = __builtin_shuffle(whole, second, even);
  second = __builtin_shuffle(whole, second, even + 1);
}

inline void join_lanes(floats& even, floats& odd) {
  const ints places = (lane_numbers() >> 1) + (lane_numbers() & 1) * LANES;
  const floats whole = even;
  even = __builtin_shuffle(whole, odd, places);
  odd = __builtin_shuffle(whole, odd, places + LANES / 2);
}

// Load and widen LANES numbers of 16 or 8 bits.

inline words load_u16(const uint8_t* at) {
#if defined(__AVX512F__)
  return (words)_mm512_cvtepu16_epi32(load<__m256i>(at));
#elif defined(__AVX2__)
  return (words)_mm256_cvtepu16_epi32(load<__m128i>(at));
#else
  typedef uint16_t shorts __attribute__((vector_size(LANES * 2)));
  return __builtin_convertvector(load<shorts>(at), words);
#endif
}

inline ints load_i8(const uint8_t* at) {
#if defined(__AVX512F__)
  return (ints)_mm512_cvtepi8_epi32(load<__m128i>(at));
#elif defined(__AVX2__)
  return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at));
#else
  typedef int8_t bytes __attribute__((vector_size(LANES)));
  return __builtin_convertvector(load<bytes>(at), ints);
#endif
}

// Stores the low 8 bits of each lane.
inline void store_i8(int8_t* at, ints numbers) {
#if defined(__AVX512F__)
  store(at, _mm512_cvtepi32_epi8((__m512i)numbers));
#else
  typedef int8_t bytes __attribute__((vector_size(LANES)));
  store(at, __builtin_convertvector(numbers, bytes));
#endif
}

inline floats load_bf16(const uint8_t* at) { return (floats)(load_u16(at) << 16); }

// The bits of the nearest bf16 numbers, ties to even, in the low half of each lane.
inline words round_to_bf16(floats values) {
  const words bits = (words)values;
  const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (words)(values == values ? (ints)rounded : splat(0x7fc0));
}

inline void store_bf16(uint8_t* at, floats values) {
  const words bits = round_to_bf16(values);
#if defined(__AVX512F__)
  store(at, _mm512_cvtepi32_epi16((__m512i)bits));
#else
  typedef uint16_t shorts __attribute__((vector_size(LANES * 2)));
  store(at, __builtin_convertvector(bits, shorts));
#endif
}

inline floats load_fp16(const uint8_t* at) {
#if defined(__AVX512F__)
  return (floats)_mm512_cvtph_ps(load<__m256i>(at));
#elif defined(__AVX2__)
  return (floats)_mm256_cvtph_ps(load<__m128i>(at));
#else
  // a multiplication adjusts the exponent, which is correct for subnormal numbers too
  const words bits = load_u16(at);
  const floats scaled = (floats)((bits & 0x7fff) << 13) * 0x1p112f;
  const words special = (words)(scaled >= splat(0x1p16f)) & 0x7f800000;
  return (floats)((words)scaled | special | (bits & 0x8000) << 16);
#endif
}

// e4m3 values (no NaN) divided by 256: decoded as fp16, so that subnormal numbers cost nothing
inline floats load_fp8(const uint8_t* at) {
#if defined(__AVX512F__)
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load<__m128i>(at)), 7);
  return (floats)_mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16((short)0xbf80)));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)at);
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
  return (floats)_mm256_cvtph_ps(_mm_and_si128(shifted, _mm_set1_epi16((short)0xbf80)));
#else
  const words bits = (words)load_i8(at);
  const words magnitude = (bits & 0x7f) << 20;
  const words subnormal = (words)(magnitude < (1u << 23));
  // a subnormal number is decoded with a leading bit, which is then subtracted
  const words exponent = (112u << 23) + (subnormal & (1u << 23));
  const floats value = (floats)(magnitude + exponent) - (floats)(subnormal & (113u << 23));
  return (floats)((words)value | (bits & 0x80000000));
#endif
}

inline ints larger(ints a, ints b) {
#if defined(__AVX512F__)
  return (ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}

inline longs larger(longs a, longs b) {
#if defined(__AVX512F__)
  return (longs)_mm512_max_epi64((__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}

inline longs smaller(longs a, longs b) {
#if defined(__AVX512F__)
  return (longs)_mm512_min_epi64((__m512i)a, (__m512i)b);
#else
  return a > b ? b : a;
#endif
}

// Integers that order like the fp32 numbers; -0 equals 0, and NaN is the largest.
inline ints ordered(floats numbers) {
  numbers = numbers + 0.f;
  const ints bits = (ints)numbers;
  const ints mapped = bits ^ ((bits >> 31) & INT32_MAX);
  return numbers == numbers ? mapped : splat(INT32_MAX);
}

inline float number_of(int32_t ordered) {
  const int32_t bits = ordered ^ ((ordered >> 31) & INT32_MAX);
  return load<float>(&bits);
}

// Bit l is set if lane l of `a` is at least `b`.
inline uint32_t at_least(ints a, int32_t b) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_cmp_epi32_mask((__m512i)a, _mm512_set1_epi32(b), _MM_CMPINT_NLT);
  // in assembly, because GCC 12 may spill 16 bits and reload 32
  uint32_t bits;
  asm("kmovw %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
#elif defined(__AVX2__)
  return ~_mm256_movemask_ps((__m256)(a < splat(b))) & 0xff;
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; lane++) bits |= (uint32_t)(a[lane] >= b) << lane;
  return bits;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For every bit set of lanes, the numbers of these lanes, one per byte, lowest first.
struct LaneLists {
  uint64_t of[1 << LANES];
  constexpr LaneLists() : of{} {
    for (int bits = 0; bits < 1 << LANES; bits++)
      for (int lane = 0, place = 0; lane < LANES; lane++)
        if (bits >> lane & 1) of[bits] |= (uint64_t)lane << 8 * place++;
  }
};
inline constexpr LaneLists LANE_LISTS;
#endif

// Writes the lanes whose bit is set contiguously; may overwrite up to LANES elements.
inline void compress(int32_t* to, uint32_t bits, ints lanes) {
#if defined(__AVX512F__)
  // compressing straight to memory is slow on AMD
  store(to, _mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)lanes));
#elif defined(__AVX2__)
  const __m256i list = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)LANE_LISTS.of[bits]));
  store(to, _mm256_permutevar8x32_epi32((__m256i)lanes, list));
#else
  for (; bits; bits &= bits - 1) *to++ = lanes[__builtin_ctz(bits)];
#endif
}

// e^x for x <= 0, accurate to 2 units in the last place; 0 below e^-87; NaN stays NaN.
inline floats exp_negative(floats x) {
  const floats lowest = splat(-87.f);
  const floats clamped = x < lowest ? lowest : x;
  // x = n ln 2 + r, with ln 2 split into two parts so that r is exact
  const floats magic = splat(0x1.8p23f);
  const floats shifted = clamped * 1.44269504f + magic;
  const floats n = shifted - magic;
  const floats r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  // the Taylor series up to r^7 / 7!, |r| <= ln 2 / 2
  floats series = splat(1.f / 5040);
  for (float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    series = series * r + factor;
  // the low bits of the shifted number are n itself
  const floats power = (floats)((((words)shifted) + 127) << 23);
  return x < lowest ? splat(0.f) : series * power;
}

// x / (1 + e^-x)
inline floats silu(floats x) {
  const floats power = exp_negative(x < 0 ? x : -x);
  return x * (x < 0 ? power : splat(1.f)) / (power + 1.f);
}

}  // namespace memplus
