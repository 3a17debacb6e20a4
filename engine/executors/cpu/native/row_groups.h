// Rows of inputs in groups of integers, for weights in groups (weight_groups.h).
//
// Inputs far above the root mean square of their row would make the errors of their groups large. They
// are kept as they are, and are 0 in their groups (mixed-precision decomposition of arXiv 2208.07339).
#pragma once

#include "values.h"

namespace memplus {

constexpr int64_t GROUP = 32;

// One group of a row of inputs, each of which is `values[i] * scale`.
struct RowGroup {
  int8_t values[GROUP];
  float scale;
  union {
    int32_t correction;  // start of a sum of products, which removes the offset of the weights
    float sum;           // of the inputs, for weights with minimums
  };
};

struct Outlier {
  int32_t input;
  float value;
};

// The groups of a row in memory; after them, if the row keeps outliers, their number and the outliers.
class RowGroups {
 public:
  // Outliers are farther from 0 than this many times the root mean square. In SmolLM2 0.6 to 0.8 % of
  // the inputs are, and make half to five sixths of the squared errors of most products.
  static constexpr int FAR = 4;

  static int64_t bytes(int64_t steps, bool keeps_outliers) {
    return steps * sizeof(RowGroup) +
           (keeps_outliers ? sizeof(int32_t) + most_outliers(steps) * sizeof(Outlier) : 0);
  }

  RowGroups(const uint8_t* row, int64_t steps) : row_(row), steps_(steps) {}

  const RowGroup* groups() const { return (const RowGroup*)row_; }
  int32_t num_outliers() const { return *(const int32_t*)(groups() + steps_); }
  const Outlier* outliers() const { return (const Outlier*)((const int32_t*)(groups() + steps_) + 1); }

 private:
  // Fewer than one in FAR * FAR values can exceed FAR times the root mean square of all. One more per
  // group allows for rounding of the mean.
  static int64_t most_outliers(int64_t steps) { return steps * (GROUP / (FAR * FAR) + 1); }

  const uint8_t* row_;
  const int64_t steps_;
};

// Fills the list of outliers of a row, after its groups.
class OutlierList {
 public:
  // A row has no outliers if squares are so small that their rounding counts, or if their sum is
  // infinite or NaN.
  OutlierList(uint8_t* row, int64_t steps, float mean_square)
      : count_((int32_t*)((RowGroup*)row + steps)), outliers_((Outlier*)(count_ + 1)),
        limit_(RowGroups::FAR * RowGroups::FAR * mean_square) {
    *count_ = 0;
    if (!(limit_ >= 0x1p-126f)) limit_ = __builtin_inff();
  }

  // Whether values of up to `size` may be outliers.
  bool may_have(float size) const { return size * size > limit_; }

  // Moves the outliers of a vector, the row's `first` and later values, to the list.
  void take(floats& values, int64_t first) {
    const ints is_outlier = values * values > limit_;
    for (int lane = 0; lane < LANES; lane++)
      if (is_outlier[lane]) outliers_[(*count_)++] = {(int32_t)first + lane, values[lane]};
    values = is_outlier ? floats{} : values;
  }

 private:
  int32_t* const count_;
  Outlier* const outliers_;
  float limit_;  // squares above it are outliers'
};

}  // namespace memplus
