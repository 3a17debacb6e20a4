// A row of logits in blocks, with the largest logit of each block: a search for large logits skips
// most blocks.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "values.h"

namespace memplus {

constexpr int64_t BLOCK = 256;  // logits
static_assert(BLOCK % LANES == 0);

template <int STRIDE = LANES / 2>
inline int32_t largest(ints lanes) {
  if constexpr (STRIDE == 0)
    return lanes[0];
  else
    return largest<STRIDE / 2>(larger(lanes, __builtin_shuffle(lanes, lane_numbers() ^ STRIDE)));
}

template <int STRIDE = LANES / 2>
inline float pairwise_sum(floats lanes) {
  if constexpr (STRIDE == 0)
    return lanes[0];
  else
    return pairwise_sum<STRIDE / 2>(lanes + __builtin_shuffle(lanes, lane_numbers() ^ STRIDE));
}

// Logits [rows, vocab_size]; rows are `stride` values apart.
struct Logits {
  const uint8_t* data;
  int64_t rows, vocab_size, stride;

  template <class Values>
  const uint8_t* row(int64_t number) const {
    return data + number * stride * Values::bytes;
  }
};

template <class Values>
class LogitsRow {
 public:
  static constexpr int64_t bytes = Values::bytes;

  explicit LogitsRow(int64_t size) : size_(size), maxima_((size + BLOCK - 1) / BLOCK) {
    const floats least = splat(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < BLOCK; i += LANES) Values::narrow(last_ + i * bytes, least);
  }

  // Selects a row, which must stay in memory.
  void read(const uint8_t* row) {
    row_ = row;
    const int64_t left = size_ % BLOCK;
    std::memcpy(last_, row + (size_ - left) * bytes, left * bytes);
    for (int64_t b = 0; b < blocks(); b++) {
      ints lanes = ordered(vector(b, 0));
      for (int64_t i = LANES; i < BLOCK; i += LANES) lanes = larger(lanes, ordered(vector(b, i)));
      maxima_[b] = memplus::largest(lanes);
    }
    largest_ = *std::max_element(maxima_.begin(), maxima_.end());
  }

  int64_t size() const { return size_; }
  int64_t blocks() const { return (int64_t)maxima_.size(); }

  // LANES logits of a block from number i on; -inf behind the row's end.
  floats vector(int64_t block, int64_t i) const {
    const uint8_t* at = (block + 1) * BLOCK <= size_ ? row_ + block * BLOCK * bytes : last_;
    return Values::widened(at + i * bytes);
  }

  float at(int64_t place) const {
    return vector(place / BLOCK, place % BLOCK / LANES * LANES)[place % LANES];
  }

  // The largest logit, or NaN if any logit is NaN.
  float largest() const { return number_of(largest_); }
  float largest(int64_t block) const { return number_of(maxima_[block]); }

  int64_t first_of_largest() const {
    const int64_t block = std::find(maxima_.begin(), maxima_.end(), largest_) - maxima_.begin();
    for (int64_t i = 0;; i += LANES)
      if (const uint32_t found = at_least(ordered(vector(block, i)), largest_))
        return block * BLOCK + i + __builtin_ctz(found);
  }

  // A threshold that at least `count` logits reach, and few more if `count` is small; -inf if there
  // are fewer blocks.
  float reached_by(int64_t count) const {
    if (count > blocks()) return -std::numeric_limits<float>::infinity();
    std::vector<int32_t> maxima = maxima_;
    std::nth_element(maxima.begin(), maxima.begin() + count - 1, maxima.end(), std::greater<>());
    return number_of(maxima[count - 1]);
  }

 private:
  const int64_t size_;
  std::vector<int32_t> maxima_;  // as ordered integers
  int32_t largest_ = 0;
  const uint8_t* row_ = nullptr;
  uint8_t last_[BLOCK * bytes];  // the last block, if it is shorter
};

}  // namespace memplus
