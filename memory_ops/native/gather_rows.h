// out[t] = sum over c of weights[t, c] * table[ids[t, c]]
//
// Reads of random rows dominate the time. The sums of a tile of columns stay in registers while a
// group of rows is added. The same columns of later rows are prefetched into the L2 cache, which
// supports more outstanding misses than the L1 cache. Even for one token all cores read: each a
// part of the width.
#pragma once

#include <algorithm>
#include <type_traits>

#include "row_table.h"
#include "threads.h"

namespace memplus {

constexpr int64_t COLUMN_STEP = 128;  // threads split columns at multiples of this

// The fastest measured settings of a format. `vectors`: vectors of sums in registers, at most
// `most_vectors` if at least two tiles are left. `group`: rows added to one tile before the next
// tile. `ahead`: prefetch distance in rows. `near`: that of a second prefetch, from the L2 to the L1
// cache, or 0: int4 rows, which take the most instructions a byte, gain by it.
template <class Row>
struct Schedule {
  static constexpr int vectors = 8, most_vectors = vectors;
  static constexpr int64_t group = std::min<int64_t>(Row::line_values, 32), ahead = group;
  static constexpr int64_t near = Row::line_values > LINE ? 4 : 0;
};

template <class Row>
struct IntelSchedule : Schedule<Row> {
#if defined(__AVX512F__)
  static constexpr bool narrow = Row::line_values >= LINE;
  static constexpr int vectors = narrow ? 8 : 16;
  static constexpr int most_vectors = Row::in_halves ? 24 : vectors;
  static constexpr int64_t group = Row::line_values > LINE ? 64 : 128;
  static constexpr int64_t ahead = Row::line_values < LINE ? 8 : 16;
#endif
};

inline bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// References grouped by sum: sum s has those in [starts[s], starts[s + 1]), or `per_sum` each if
// `starts` is null.
struct Sums {
  const int64_t* ids;
  const float* weights;
  const int64_t* starts;
  int64_t per_sum;
  float* out;

  int64_t start(int64_t sum) const { return starts ? starts[sum] : sum * per_sum; }
};

template <class Row, int LOCALITY = 2>
inline void prefetch_columns(const Table& table, int64_t id, int64_t at, int64_t columns) {
  const uint8_t* from = table.row(id) + at * LINE / Row::line_values;
  const int64_t bytes = columns * LINE / Row::line_values;
  for (int64_t byte = 0; byte < bytes; byte += LINE) __builtin_prefetch(from + byte, 0, LOCALITY);
}

template <class Row>
inline void prefetch_scales(const Table& table, int64_t id, int64_t at) {
  if (table.scale_offset) __builtin_prefetch(scales_of<Row>(table, table.row(id), at), 0, 2);
}

inline floats plus_product(floats sum, floats numbers, floats factor) {
  return sum + numbers * factor;
}

// The multiplication broadcasts the factor, which is in memory.
inline floats plus_product(floats sum, floats numbers, const float& factor) {
#if defined(__AVX512F__)
  // in assembly, because GCC 12 spends an instruction on a factor of two products
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(numbers), "m"(factor));
  return sum;
#else
  return sum + numbers * factor;
#endif
}

// Adds the rows of some references to VECTORS vectors of sums from column `at` on. Prefetches rows
// of references up to `end`.
template <class Row, class How, int VECTORS>
inline void add_tile(const Table& table, const Sums& sums, const typename Row::Factors* factors,
                     Span which, int64_t end, int64_t at, float* out) {
  constexpr int64_t columns = VECTORS * LANES;
  constexpr bool in_halves = Row::in_halves && VECTORS % 2 == 0;
  // tells the compiler that tiles of this size are whole blocks
  if (columns % Row::line_values == 0) at &= -Row::line_values;
  // one by one, because the compiler keeps an array that is copied as a whole in memory
  floats total[VECTORS];
  out += at;
#pragma GCC unroll 24
  for (int v = 0; v < VECTORS; v++) total[v] = load<floats>(out + v * LANES);
  if constexpr (in_halves)
    for (int v = 0; v < VECTORS; v += 2) part_lanes(total[v], total[v + 1]);
  for (int64_t i = which.first; i < which.last; i++) {
    const int64_t next = std::min(i + How::ahead, end - 1);
    prefetch_columns<Row>(table, sums.ids[next], at, columns);
    if (How::near)
      prefetch_columns<Row, 3>(table, sums.ids[std::min(i + How::near, end - 1)], at, columns);
    const Row row(table.row(sums.ids[i]), at, *factors++);
#pragma GCC unroll 24
    for (int v = 0; v < VECTORS; v++) {
      const int64_t place = v * LANES;
      floats codes;
      if constexpr (in_halves)
        codes = v % 2 ? row.odd_codes(place - LANES) : row.even_codes(place);
      else
        codes = row.codes(place);
      total[v] = plus_product(total[v], codes, row.factor(place));
    }
  }
  if constexpr (in_halves)
    for (int v = 0; v < VECTORS; v += 2) join_lanes(total[v], total[v + 1]);
#pragma GCC unroll 24
  for (int v = 0; v < VECTORS; v++) store(out + v * LANES, total[v]);
}

// The same for the last `count` columns, fewer than a vector.
template <class Row, class How>
inline void add_last_columns(const Table& table, const Sums& sums,
                             const typename Row::Factors* factors, Span which, int64_t end,
                             int64_t at, int64_t count, float* out) {
  floats total{};
  std::memcpy(&total, out + at, count * sizeof(float));
  for (int64_t i = which.first; i < which.last; i++) {
    const int64_t next = std::min(i + How::ahead, end - 1);
    prefetch_columns<Row>(table, sums.ids[next], at, LANES);
    const Row row(table.row(sums.ids[i]), at, *factors++);
    total += row.last_codes(0, count) * row.factor(0);
  }
  std::memcpy(out + at, &total, count * sizeof(float));
}

// Adds the rows of some references, at most How::group, to columns that share their factors.
template <class Row, class How>
inline void add_rows(const Table& table, const Sums& sums, Span which, int64_t end, Span columns,
                     float* out) {
  constexpr int vectors = How::vectors, most = How::most_vectors;
  int64_t at = columns.first;
  // ahead of the sums, because a load soon after the store of a factor waits for it
  typename Row::Factors factors[How::group];
  for (int64_t i = which.first; i < which.last; i++) {
    prefetch_scales<Row>(table, sums.ids[std::min(i + How::ahead, end - 1)], at);
    const uint8_t* scales = scales_of<Row>(table, table.row(sums.ids[i]), at);
    factors[i - which.first] = Row::factors(scales, sums.weights[i]);
  }
  if constexpr (most > vectors)
    for (; at + (most + vectors) * LANES <= columns.last; at += most * LANES)
      add_tile<Row, How, most>(table, sums, factors, which, end, at, out);
  for (; at + vectors * LANES <= columns.last; at += vectors * LANES)
    add_tile<Row, How, vectors>(table, sums, factors, which, end, at, out);
  for (; at + 4 * LANES <= columns.last; at += 4 * LANES)
    add_tile<Row, How, 4>(table, sums, factors, which, end, at, out);
  for (; at + LANES <= columns.last; at += LANES)
    add_tile<Row, How, 1>(table, sums, factors, which, end, at, out);
  if (at < columns.last)
    add_last_columns<Row, How>(table, sums, factors, which, end, at, columns.last - at, out);
}

// Computes some columns of the sums [which.first, which.last), or adds to them.
template <class Row, class How, bool ADDS = false>
inline void gather_part(const Table& table, const Sums& sums, Span which, Span columns) {
  const int64_t begin = sums.start(which.first), end = sums.start(which.last);
  for (int64_t i = begin; i < std::min(begin + How::ahead, end); i++) {
    prefetch_columns<Row>(table, sums.ids[i], columns.first, columns.last - columns.first);
    prefetch_scales<Row>(table, sums.ids[i], columns.first);
  }
  for (int64_t s = which.first; s < which.last; s++) {
    float* out = sums.out + s * table.value_dim;
    if (!ADDS)
      std::memset(out + columns.first, 0, (columns.last - columns.first) * sizeof(float));
    const int64_t last = sums.start(s + 1);
    for (int64_t first = sums.start(s); first < last; first += How::group) {
      const Span group = {first, std::min(first + How::group, last)};
      for (Span some = columns; some.first < columns.last; some.first = some.last) {
        const int64_t scaled = (some.first / Row::scaled_values + 1) * Row::scaled_values;
        some.last = std::min(scaled, columns.last);
        add_rows<Row, How>(table, sums, group, end, some, out);
      }
    }
  }
}

// Some columns of some sums.
struct SumsPart {
  Span sums, columns;
};

inline int64_t column_steps(const Table& table) {
  return (table.value_dim + COLUMN_STEP - 1) / COLUMN_STEP;
}

// The part of `num_sums` sums that one of `threads` threads computes.
inline SumsPart sums_part(const Table& table, int64_t num_sums, int64_t thread, int64_t threads) {
  const int64_t steps = column_steps(table);
  // split by sums or by columns, whichever gives the busiest thread less work
  const auto most = [&](int64_t count) { return (count + threads - 1) / threads; };
  if (num_sums * most(steps) >= most(num_sums) * steps)
    return {piece(num_sums, thread, threads), {0, table.value_dim}};
  const Span own = piece(steps, thread, threads);
  return {{0, num_sums},
          {own.first * COLUMN_STEP, std::min(own.last * COLUMN_STEP, table.value_dim)}};
}

inline void gather_rows(const Table& table, const Sums& sums, SumsPart part) {
  with_row_type(table.format, [&](auto* row) {
    using Row = std::remove_pointer_t<decltype(row)>;
    is_intel() ? gather_part<Row, IntelSchedule<Row>>(table, sums, part.sums, part.columns)
               : gather_part<Row, Schedule<Row>>(table, sums, part.sums, part.columns);
  });
}

inline void gather_rows(const Table& table, const Sums& sums, int64_t num_sums) {
  in_parallel(std::max(column_steps(table), num_sums), [&](int64_t thread, int64_t threads) {
    gather_rows(table, sums, sums_part(table, num_sums, thread, threads));
  });
}

}  // namespace memplus
