// out[t] = sum over c of weights[t, c] * table[ids[t, c]]
//
// Reads of random rows dominate the time. The sums of a tile of columns stay in registers while
// rows are added, because stores between reads cost bandwidth. The same columns of later rows are
// prefetched. Even for one token all cores read: each a part of the width.
#pragma once

#include <algorithm>
#include <type_traits>

#include "row_table.h"
#include "threads.h"

namespace memplus {

constexpr int64_t COLUMN_STEP = 128;  // threads split columns at multiples of this

// The fastest measured settings of a format. `vectors`: vectors of sums in registers, at most
// `most_vectors` if at least two tiles are left. `group`: rows added to one tile before the next
// tile. `ahead`: prefetch distance in rows. `locality`: that of __builtin_prefetch.
template <class Row>
struct Schedule {
#if defined(__AVX512F__)
  static constexpr bool wide = Row::line_values <= LINE;
  static constexpr int vectors = wide ? 16 : 8, most_vectors = Row::in_halves ? 24 : vectors;
  static constexpr int64_t group = wide ? INT32_MAX : 32;
  static constexpr int64_t ahead = Row::line_values < LINE ? 8 : 32;
#else
  // few registers need narrow tiles, and small groups reuse rows while they are in cache
  static constexpr int vectors = 8, most_vectors = vectors;
  static constexpr int64_t group = 16, ahead = 16;
#endif
  static constexpr int locality = 3;
};

// Intel cores support fewer outstanding misses in their L1 cache than in their L2 cache.
template <class Row>
struct IntelSchedule : Schedule<Row> {
#if defined(__AVX512F__)
  static constexpr bool whole_bytes = Row::line_values == LINE;
  static constexpr bool half_bytes = Row::line_values > LINE;
  static constexpr int vectors = whole_bytes ? 8 : 16;
  static constexpr int most_vectors = Row::in_halves ? 24 : vectors;
  static constexpr int64_t group = half_bytes ? 64 : INT32_MAX;
  static constexpr int64_t ahead = Row::line_values < LINE ? 8 : 16;
#endif
  static constexpr int locality = 2;
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

template <class Row, int LOCALITY>
inline void prefetch_columns(const Table& table, const uint8_t* row, int64_t at, int64_t columns) {
  const int64_t from = at * LINE / Row::line_values;
  const int64_t to = (at + columns) * LINE / Row::line_values;
  for (int64_t byte = from; byte < to; byte += LINE) __builtin_prefetch(row + byte, 0, LOCALITY);
  if (table.scale_offset && at == 0) __builtin_prefetch(row + table.scale_offset, 0, LOCALITY);
}

// Adds the rows of some references to VECTORS vectors of sums from column `at` on. If `count` is
// not 0, only `count` columns of the row are left. Prefetches rows of references up to `end`.
template <class Row, class How, int VECTORS>
inline void add_tile(const Table& table, const Sums& sums, Span which, int64_t end, int64_t at,
                     int64_t count, float* out) {
  constexpr int64_t columns = VECTORS * LANES;
  // if tiles are whole blocks, the offset within a block is a compile-time constant
  const int64_t offset = columns % Row::line_values ? at % Row::line_values : 0;
  floats total[VECTORS] = {};
  if (count)
    std::memcpy(total, out + at, count * sizeof(float));
  else
    std::memcpy(total, out + at, sizeof total);
  constexpr bool in_halves = Row::in_halves && VECTORS % 2 == 0;
  // a Row reads the scales of one block only
  constexpr bool several_blocks = Row::line_values > LINE && columns > Row::line_values;
  constexpr int reach = several_blocks ? Row::line_values / LANES : VECTORS;
  if constexpr (in_halves)
    for (int v = 0; v < VECTORS; v += 2) part_lanes(total[v], total[v + 1]);
  for (int64_t i = which.first; i < which.last; i++) {
    const int64_t next = std::min(i + How::ahead, end - 1);
    prefetch_columns<Row, How::locality>(table, table.row(sums.ids[next]), at, columns);
    const uint8_t* data = table.row(sums.ids[i]);
    if (count) {
      const Row row(table, data, at - offset, sums.weights[i]);
      total[0] += row.last_codes(offset, count) * row.factor(offset);
      continue;
    }
#pragma GCC unroll 2
    for (int first = 0; first < VECTORS; first += reach) {
      const Row row(table, data, at - offset + first * LANES, sums.weights[i]);
#pragma GCC unroll 24
      for (int v = 0; v < reach; v++) {
        const int64_t place = offset + v * LANES;
        floats& sum = total[first + v];
        if constexpr (in_halves)
          sum += (v % 2 ? row.odd_codes(place - LANES) : row.even_codes(place)) * row.factor(place);
        else
          sum += row.codes(place) * row.factor(place);
      }
    }
  }
  if constexpr (in_halves)
    for (int v = 0; v < VECTORS; v += 2) join_lanes(total[v], total[v + 1]);
  std::memcpy(out + at, total, count ? count * sizeof(float) : sizeof total);
}

// Computes some columns of the sums [which.first, which.last), or adds to them.
template <class Row, class How, bool ADDS = false>
inline void gather_part(const Table& table, const Sums& sums, Span which, Span columns) {
  constexpr int vectors = How::vectors, most = How::most_vectors;
  const int64_t begin = sums.start(which.first), end = sums.start(which.last);
  for (int64_t i = begin; i < std::min(begin + How::ahead, end); i++)
    prefetch_columns<Row, How::locality>(table, table.row(sums.ids[i]), columns.first,
                                              columns.last - columns.first);
  for (int64_t s = which.first; s < which.last; s++) {
    float* out = sums.out + s * table.value_dim;
    if (!ADDS)
      std::memset(out + columns.first, 0, (columns.last - columns.first) * sizeof(float));
    const int64_t last = sums.start(s + 1);
    for (int64_t first = sums.start(s); first < last; first += How::group) {
      const Span group = {first, std::min(first + How::group, last)};
      int64_t at = columns.first;
      if constexpr (most > vectors)
        for (; at + (most + vectors) * LANES <= columns.last; at += most * LANES)
          add_tile<Row, How, most>(table, sums, group, end, at, 0, out);
      for (; at + vectors * LANES <= columns.last; at += vectors * LANES)
        add_tile<Row, How, vectors>(table, sums, group, end, at, 0, out);
      for (; at + 4 * LANES <= columns.last; at += 4 * LANES)
        add_tile<Row, How, 4>(table, sums, group, end, at, 0, out);
      for (; at + LANES <= columns.last; at += LANES)
        add_tile<Row, How, 1>(table, sums, group, end, at, 0, out);
      if (at < columns.last)
        add_tile<Row, How, 1>(table, sums, group, end, at, columns.last - at, out);
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
