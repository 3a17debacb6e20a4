// The dot products of bytes that integer products consist of.
#pragma once

#include "memory_ops/native/simd.h"

namespace memplus {

// Adds to each lane the products of its four unsigned bytes and its four signed bytes.
inline ints add_byte_products(ints sum, words unsigned_bytes, words signed_bytes) {
#if defined(__AVX512VNNI__)
  return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif defined(__AVX512BW__)
  const __m512i low = _mm512_set1_epi16(0xff), x = (__m512i)signed_bytes,
                w = (__m512i)unsigned_bytes;
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, low),
                                         _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return sum + (ints)even + (ints)odd;
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi16(0xff), x = (__m256i)signed_bytes,
                w = (__m256i)unsigned_bytes;
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, low),
                                         _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return sum + (ints)even + (ints)odd;
#else
  for (int shift = 0; shift < 32; shift += 8)
    sum += (ints)(unsigned_bytes >> shift & 0xff) * ((ints)(signed_bytes << (24 - shift)) >> 24);
  return sum;
#endif
}

}  // namespace memplus
