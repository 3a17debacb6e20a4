// The product that attention uses twice: rows of words (two bf16 values or one fp32 each) times a
// matrix with one line of vectors per word. In int8, a word is four bytes and sums are integers.
#pragma once

#include "values.h"

namespace memplus {

struct WordRows {
  const uint8_t* at;
  int64_t stride;  // bytes
};

struct VectorRows {
  floats* at;
  int64_t stride;  // vectors
};

template <class Values, int ROWS, int VECTORS>
inline void add_products(WordRows rows, VectorRows lines, VectorRows sums, int64_t steps) {
  typename Values::Sums sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++)
      sum[r][v] = (typename Values::Sums)sums.at[r * sums.stride + v];
  for (int64_t step = 0; step < steps; step++) {
    const floats* line = lines.at + step * lines.stride;
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      const words factor = words{} + load<uint32_t>(rows.at + r * rows.stride + step * 4);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        sum[r][v] = Values::add_products(sum[r][v], factor, (words)line[v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) sums.at[r * sums.stride + v] = (floats)sum[r][v];
}

template <class Values, int ROWS>
inline void add_products(int64_t vectors, WordRows rows, VectorRows lines, VectorRows sums,
                         int64_t steps) {
  for (; vectors >= 4; vectors -= 4, lines.at += 4, sums.at += 4)
    add_products<Values, ROWS, 4>(rows, lines, sums, steps);
  for (; vectors > 0; vectors--, lines.at++, sums.at++)
    add_products<Values, ROWS, 1>(rows, lines, sums, steps);
}

// sums[r, v] += sum over steps of rows[r, step] * lines[step, v], one step after another
template <class Values>
inline void add_products(int64_t count, int64_t vectors, WordRows rows, VectorRows lines,
                         VectorRows sums, int64_t steps) {
  const auto onwards = [&](int64_t done) {
    count -= done, rows.at += done * rows.stride, sums.at += done * sums.stride;
  };
  for (; count >= 6; onwards(6)) add_products<Values, 6>(vectors, rows, lines, sums, steps);
  for (; count >= 3; onwards(3)) add_products<Values, 3>(vectors, rows, lines, sums, steps);
  for (; count > 0; onwards(1)) add_products<Values, 1>(vectors, rows, lines, sums, steps);
}

}  // namespace memplus
