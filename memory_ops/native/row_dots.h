// dots[t, c] = table[ids[t, c]] . x[t]
#pragma once

#include "gather_rows.h"

namespace memplus {

constexpr int TOGETHER = 4;        // rows read concurrently
constexpr int64_t DOTS_AHEAD = 8;  // prefetch distance in rows

template <class Row, int ROWS>
inline void dot_rows(const Table& table, const int64_t* ids, const int64_t* coming, const float* x,
                     float* dots) {
  floats totals[ROWS] = {};
  typename Row::Factors factors[ROWS];
  int64_t block = 0;
  for (; block < table.value_dim; block += Row::line_values) {
    const int64_t columns = std::min(Row::line_values, table.value_dim - block);
    for (int r = 0; r < ROWS; r++) {
      prefetch_columns<Row>(table, coming[r], block, columns);
      const uint8_t* data = table.row(ids[r]);
      if (block % Row::scaled_values == 0) {
        prefetch_scales<Row>(table, coming[r], block);
        factors[r] = Row::factors(scales_of<Row>(table, data, block), 1);
      }
      const Row row(data, block, factors[r]);
      int64_t at = 0;
      for (; at + LANES <= columns; at += LANES)
        totals[r] += row.codes(at) * row.factor(at) * load<floats>(x + block + at);
      if (at == columns) continue;
      // lane by lane, because values past the end may be NaN and must not reach the sum
      const floats last = row.last_codes(at, columns - at) * row.factor(at);
      for (int64_t lane = 0; lane < columns - at; lane++)
        totals[r][lane] += last[lane] * x[block + at + lane];
    }
  }
  for (int r = 0; r < ROWS; r++) dots[r] = sum(totals[r]);
}

inline void row_dots(const Table& table, const int64_t* ids, const float* x_TV, int64_t num_tokens,
                     int64_t per_token, float* dots) {
  const int64_t count = num_tokens * per_token;
  in_parallel(count / TOGETHER, [&](int64_t thread, int64_t threads) {
    const Span mine = piece(count, thread, threads);
    with_row_type(table.format, [&](auto* row_type) {
      using Row = std::remove_pointer_t<decltype(row_type)>;
      for (int64_t at = mine.first; at < mine.last;) {
        const int64_t token = at / per_token;
        const int64_t left = std::min((token + 1) * per_token, mine.last) - at;
        const int64_t* coming = ids + std::min(at + DOTS_AHEAD, mine.last - TOGETHER);
        const float* x = x_TV + token * table.value_dim;
        if (left < TOGETHER) {
          dot_rows<Row, 1>(table, ids + at, ids + at, x, dots + at);
          at++;
        } else {
          dot_rows<Row, TOGETHER>(table, ids + at, coming, x, dots + at);
          at += TOGETHER;
        }
      }
    });
  });
}

}  // namespace memplus
