// Sorts references by row, so that each row's gradient is one deterministic sum.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include "threads.h"

namespace memplus {

constexpr int POSITION_BITS = 31;  // references are fewer than 2^31
constexpr uint64_t MOST_ROWS = 1ull << (64 - POSITION_BITS);
constexpr int DIGIT_BITS = 11;

struct Grouped {
  int64_t* rows;    // the distinct rows, ascending
  int64_t* starts;  // the first reference of each row, then the end
  int64_t* tokens;  // of the references, by row, then in their order
  float* weights;   // of the references, in the same order
};

// Sorts `count` references, `per_token` per token. Returns the number of distinct rows, or -1 - the
// index of an invalid id.
inline int64_t group_rows(const int64_t* ids, const float* weights, int64_t count,
                          int64_t per_token, Grouped grouped) {
  std::unique_ptr<uint64_t[]> from(new uint64_t[count]), to(new uint64_t[count]);
  uint64_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    if ((uint64_t)ids[i] >= MOST_ROWS) return -1 - i;
    largest = std::max(largest, (uint64_t)ids[i]);
    from[i] = (uint64_t)ids[i] << POSITION_BITS | (uint64_t)i;
  }
  // radix sort, least significant digit first: each pass keeps the order of the previous one
  for (int shift = 0; shift < 64 - POSITION_BITS && largest >> shift; shift += DIGIT_BITS) {
    int64_t next[1 << DIGIT_BITS] = {};
    const auto digit = [&](uint64_t entry) {
      return entry >> (POSITION_BITS + shift) & ((1 << DIGIT_BITS) - 1);
    };
    for (int64_t i = 0; i < count; i++) next[digit(from[i])]++;
    int64_t total = 0;
    for (int64_t& place : next) total += std::exchange(place, total);
    for (int64_t i = 0; i < count; i++) to[next[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  int64_t distinct = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = (int64_t)(from[i] >> POSITION_BITS);
    const int64_t position = (int64_t)(from[i] & ((1ull << POSITION_BITS) - 1));
    if (distinct == 0 || grouped.rows[distinct - 1] != row) {
      grouped.rows[distinct] = row;
      grouped.starts[distinct++] = i;
    }
    grouped.tokens[i] = position / per_token;
    grouped.weights[i] = weights[position];
  }
  grouped.starts[distinct] = count;
  return distinct;
}

}  // namespace memplus
