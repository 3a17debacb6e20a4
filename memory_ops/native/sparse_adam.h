// Adam for the rows that were read (arXiv 1412.6980). Other rows and their moments do not change,
// as in torch.optim.SparseAdam:
//
//   g = scale * sum over the row's references of weight * grad[token]
//   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g g;   row -= step_size * m / (sqrt(v) + eps)
//
// The row-wise variant has one moment per row:
//
//   v = b2 v + (1 - b2) mean(g g);   row -= step_size * g / (sqrt(v) + eps)
//
// Moments are fp32, or bf16 for two moments per value. Stored bf16 is rounded to nearest, ties to
// even; the row's update uses the moments before they are rounded.
//
// Each use of a row's sum computes it again from gradients in the CPU caches: storing the sums of
// all rows would take as long to write and read as the rows themselves.
#pragma once

#include <memory>

#include "gather_rows.h"

namespace memplus {

// References grouped by group_rows(), and the gradients [T, V] that their weights multiply.
struct RowGroups {
  Table gradients;
  const int64_t* rows;
  const int64_t* starts;
  const int64_t* tokens;
  const float* weights;
  int64_t count;  // of distinct rows
};

// Rows and first moments [R, V]; second moments [R, V], or fp32 [R] if `first` is null. A moment is
// a float, or the bits of a bf16 number.
template <class Moment>
struct AdamTable {
  float* rows;
  Moment* first;
  Moment* second;
};

// `rest1` and `rest2` are 1 - beta1 and 1 - beta2, computed in fp64 because fp32 loses digits.
struct AdamStep {
  float scale, step_size, beta1, rest1, beta2, rest2, eps;
};

inline floats load_some(const float* at, int64_t lanes) {
  if (lanes == LANES) return load<floats>(at);
  floats values{};
  std::memcpy(&values, at, lanes * sizeof(float));
  return values;
}

inline void store_some(float* at, floats values, int64_t lanes) {
  if (lanes == LANES) return store(at, values);
  std::memcpy(at, &values, lanes * sizeof(float));
}

inline floats load_some(const uint16_t* at, int64_t lanes) {
  if (lanes == LANES) return load_bf16((const uint8_t*)at);
  uint16_t bits[LANES] = {};
  std::memcpy(bits, at, lanes * sizeof *at);
  return load_bf16((const uint8_t*)bits);
}

inline void store_some(uint16_t* at, floats values, int64_t lanes) {
  if (lanes == LANES) return store_bf16((uint8_t*)at, values);
  uint16_t bits[LANES];
  store_bf16((uint8_t*)bits, values);
  std::memcpy(at, bits, lanes * sizeof *at);
}

constexpr int64_t ROWS_AHEAD = 1;  // prefetch distance in rows

// Calls `body(group, sums, coming)` for every row, with the V sums of its references and the row to
// prefetch.
template <class Body>
inline void for_each_row(const RowGroups& groups, Body body) {
  in_parallel(groups.count, [&](int64_t thread, int64_t threads) {
    const Span own = piece(groups.count, thread, threads);
    const int64_t width = groups.gradients.value_dim;
    std::unique_ptr<float[]> sums(new float[width]);
    for (int64_t group = own.first; group < own.last; group++) {
      const Sums one = {groups.tokens, groups.weights, groups.starts + group, 0, sums.get()};
      gather_rows(groups.gradients, one, SumsPart{{0, 1}, {0, width}});
      body(group, sums.get(), groups.rows[std::min(group + ROWS_AHEAD, own.last - 1)]);
    }
  });
}

inline floats squares(const float* values, int64_t width) {
  floats total{};
  for (int64_t at = 0; at < width; at += LANES) {
    const floats some = load_some(values + at, std::min<int64_t>(LANES, width - at));
    total += some * some;
  }
  return total;
}

// The squared norm of the gradients of all rows, independent of the number of threads.
inline double squared_norm(const RowGroups& groups) {
  std::unique_ptr<float[]> of_rows(new float[groups.count]);
  for_each_row(groups, [&](int64_t group, const float* sums, int64_t) {
    of_rows[group] = sum(squares(sums, groups.gradients.value_dim));
  });
  double total = 0;
  for (int64_t group = 0; group < groups.count; group++) total += of_rows[group];
  return total;
}

template <class Moment>
inline void adam_row(const AdamTable<Moment>& table, const AdamStep& step, int64_t place,
                     const float* gradient, int64_t lanes) {
  const floats g = load_some(gradient, lanes) * step.scale;
  const floats m = load_some(table.first + place, lanes) * step.beta1 + g * step.rest1;
  const floats v = load_some(table.second + place, lanes) * step.beta2 + g * g * step.rest2;
  const floats row = load_some(table.rows + place, lanes);
  store_some(table.first + place, m, lanes);
  store_some(table.second + place, v, lanes);
  store_some(table.rows + place, row - step.step_size * m / (square_root(v) + step.eps), lanes);
}

template <class Moment>
inline void sparse_adam(const AdamTable<Moment>& table, const RowGroups& groups,
                        const AdamStep& step) {
  const int64_t width = groups.gradients.value_dim;
  for_each_row(groups, [&](int64_t group, const float* sums, int64_t coming) {
    const int64_t row = groups.rows[group], first = row * width;
    floats factor{};
    if (!table.first) {
      __builtin_prefetch(table.second + coming, 1);
      const float mean = sum(squares(sums, width)) * step.scale * step.scale / (float)width;
      float& v = ((float*)table.second)[row];
      v = v * step.beta2 + mean * step.rest2;
      factor = splat(step.scale * step.step_size / (__builtin_sqrtf(v) + step.eps));
    }
    for (int64_t at = 0; at < width; at += LANES) {
      const int64_t lanes = std::min<int64_t>(LANES, width - at), later = coming * width + at;
      __builtin_prefetch(table.rows + later);
      if (table.first) {
        __builtin_prefetch(table.first + later);
        __builtin_prefetch(table.second + later);
        adam_row(table, step, first + at, sums + at, lanes);
      } else {
        float* values = table.rows + first + at;
        store_some(values, load_some(values, lanes) - load_some(sums + at, lanes) * factor, lanes);
      }
    }
  });
}

}  // namespace memplus
