// Root-mean-square normalisation of one row (arXiv 1910.07467), rounded as in torch.
#pragma once

#include "values.h"

namespace memplus {

template <class Values>
inline float mean_square(const uint8_t* x, int64_t size) {
  floats squares{};
  by_vectors(size, [&](int64_t, int64_t at, int64_t lanes) {
    const floats value = Values::read(x + at * Values::bytes, lanes);
    squares += value * value;
  });
  return sum(squares) / (float)size;
}

// Calls `take` with the number, place and size of each vector, and its products, not rounded yet.
template <class Values, class Take>
inline void rms_norm(const uint8_t* x, const uint8_t* weight, float eps, int64_t size, Take take) {
  const floats factor = splat(1.f / __builtin_sqrtf(mean_square<Values>(x, size) + eps));
  by_vectors(size, [&](int64_t v, int64_t at, int64_t lanes) {
    const floats normed = Values::rounded(Values::read(x + at * Values::bytes, lanes) * factor);
    take(v, at, lanes, normed * Values::read(weight + at * Values::bytes, lanes));
  });
}

template <class Values>
inline void rms_norm(const uint8_t* x, const uint8_t* weight, float eps, int64_t size,
                     uint8_t* out) {
  rms_norm<Values>(x, weight, eps, size, [&](int64_t, int64_t at, int64_t lanes, floats product) {
    Values::write(out + at * Values::bytes, product, lanes);
  });
}

}  // namespace memplus
