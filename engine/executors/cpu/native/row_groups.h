// Rows of inputs in groups of integers, for weights in groups (weight_groups.h).
//
// Inputs far above the root mean square of their row would make the errors of their groups large. They
// are kept as they are, and are 0 in their groups (mixed-precision decomposition of arXiv 2208.07339).
#pragma once

#include <algorithm>

#include "kept.h"
#include "rounded_rows.h"
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
  static int64_t bytes(int64_t steps, bool has_outliers) {
    // more squares would exceed the sum of all, and one in each group makes up for its rounding
    const int64_t most = steps * (GROUP / (FAR * FAR) + 1);
    return steps * sizeof(RowGroup) + (has_outliers ? sizeof(int32_t) + most * sizeof(Outlier) : 0);
  }

  RowGroups(const uint8_t* row, int64_t steps) : row_(row), steps_(steps) {}

  RowGroup* groups() const { return (RowGroup*)row_; }
  int32_t& num_outliers() const { return *(int32_t*)(groups() + steps_); }
  Outlier* outliers() const { return (Outlier*)(&num_outliers() + 1); }

  // The square from which on a value is an outlier, given the mean square of the row. In SmolLM2 0.6
  // to 0.8 % of the inputs are, and make half to five sixths of the squared errors of most products.
  // A row has none if squares are so small that their rounding counts.
  static float least_square(float mean_square) {
    const float least = FAR * FAR * mean_square;
    return least >= 0x1p-126f ? least : __builtin_inff();
  }

  // Moves the outliers of a vector of values, the row's `first` and later ones, to the list.
  void take_outliers(floats& values, int64_t first, float least_square) const {
    const ints is_outlier = values * values > least_square;
    for (int lane = 0; lane < LANES; lane++)
      if (is_outlier[lane])
        outliers()[num_outliers()++] = {(int32_t)first + lane, values[lane]};
    values = is_outlier ? floats{} : values;
  }

 private:
  static constexpr int FAR = 4;  // times the root mean square

  const uint8_t* row_;
  const int64_t steps_;
};

}  // namespace memplus
