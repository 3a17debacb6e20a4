// The product that attention uses twice: rows of words (one fp32, two bf16 values or four bytes each)
// times a matrix with one line of vectors per word. Sums of bytes are integers in the lanes of floats.
#pragma once

#include "values.h"

namespace memplus {

#if defined(__AVX512F__)
constexpr int MOST_ROWS = 6;  // times four vectors: 24 of 32 registers hold sums
#else
constexpr int MOST_ROWS = 3;
#endif

struct WordRows {
  const uint8_t* at;
  int64_t stride;  // bytes
};

struct VectorRows {
  floats* at;
  int64_t stride;  // vectors
};

// Vector v of line i lies at vectors[v] + i * stride. The product prefetches the same places behind
// `fetched`, if it is not null.
struct VectorLines {
  const uint8_t *const *vectors, *const *fetched;
  int64_t stride;  // bytes

  template <int VECTORS>
  struct Reader {
    const uint8_t *vectors[VECTORS], *fetched[VECTORS];
    int64_t stride, at = 0;

    words read(int v) const { return load<words>(vectors[v] + at); }

    void next() {
      for (int v = 0; v < VECTORS; v++) __builtin_prefetch(fetched[v] + at);
      at += stride;
    }
  };

  template <int VECTORS>
  Reader<VECTORS> from(int64_t vector) const {
    Reader<VECTORS> reader;
    for (int v = 0; v < VECTORS; v++) {
      reader.vectors[v] = vectors[vector + v];
      reader.fetched[v] = (fetched ? fetched : vectors)[vector + v];
    }
    reader.stride = stride;
    return reader;
  }
};

// Lines of consecutive vectors at any places; see VectorLines.
struct PlacedLines {
  const uint8_t *const *lines, *const *fetched;

  template <int VECTORS>
  struct Reader {
    const uint8_t *const *line, *const *fetched;
    int64_t first;

    words read(int v) const { return load<words>(*line + first + v * sizeof(words)); }

    void next() {
      for (int v = 0; v < VECTORS; v++)
        __builtin_prefetch(*fetched + first + v * sizeof(words));
      line++, fetched++;
    }
  };

  template <int VECTORS>
  Reader<VECTORS> from(int64_t vector) const {
    return {lines, fetched, vector * (int64_t)sizeof(words)};
  }
};

template <class Values, int ROWS, int VECTORS, class Lines>
inline void add_products(WordRows rows, const Lines& lines, int64_t first, VectorRows sums,
                         int64_t steps) {
  floats sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) sum[r][v] = sums.at[r * sums.stride + first + v];
  auto reader = lines.template from<VECTORS>(first);
  for (int64_t step = 0; step < steps; step++) {
    words line[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) line[v] = reader.read(v);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      const words factor = words{} + load<uint32_t>(rows.at + r * rows.stride + step * 4);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        sum[r][v] = Values::add_products(sum[r][v], factor, line[v]);
    }
    reader.next();
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) sums.at[r * sums.stride + first + v] = sum[r][v];
}

template <class Values, int ROWS, class Lines>
inline void add_products(int64_t vectors, WordRows rows, const Lines& lines, VectorRows sums,
                         int64_t steps) {
  int64_t first = 0;
  for (; first + 4 <= vectors; first += 4)
    add_products<Values, ROWS, 4>(rows, lines, first, sums, steps);
  for (; first < vectors; first++)
    add_products<Values, ROWS, 1>(rows, lines, first, sums, steps);
}

// Up to ROWS rows.
template <class Values, int ROWS, class Lines>
inline void add_row_products(int64_t count, int64_t vectors, WordRows rows, const Lines& lines,
                             VectorRows sums, int64_t steps) {
  if constexpr (ROWS > 0) {
    if (count == ROWS) return add_products<Values, ROWS>(vectors, rows, lines, sums, steps);
    add_row_products<Values, ROWS - 1>(count, vectors, rows, lines, sums, steps);
  }
}

// sums[r, v] += sum over steps of rows[r, step] * lines[step, v], one step after another
template <class Values, class Lines>
inline void add_products(int64_t count, int64_t vectors, WordRows rows, const Lines& lines,
                         VectorRows sums, int64_t steps) {
  for (; count > 0; count -= MOST_ROWS) {
    const int64_t some = std::min<int64_t>(count, MOST_ROWS);
    add_row_products<Values, MOST_ROWS>(some, vectors, rows, lines, sums, steps);
    rows.at += some * rows.stride, sums.at += some * sums.stride;
  }
}

}  // namespace memplus
