// Chooses tokens from rows of logits x: the first of the largest, or a draw by the weights
//
//   w[i] = exp((x[i] - max x) / temperature)     in fp32; their sums in fp64, block by block
//
// of the tokens whose weight reaches a floor: the first token, in the order of the vocabulary, at
// which the sum of weights exceeds `uniform` times their total. Each row is independent of others.
#pragma once

#include <atomic>
#include <cmath>
#include <memory>

#include "logits_row.h"
#include "progress.h"
#include "memory_ops/native/threads.h"

namespace memplus {

// Sampling parameters of one row; the fields are those of SamplingParams.
struct Choice {
  double temperature;
  int64_t top_k;
  double top_p, min_p, uniform;
};

constexpr int64_t NONE_CHOSEN = -1;
constexpr double LEAST_TEMPERATURE = 1e-30;
constexpr double ROUNDING = 1e-6;     // weights this close below a floor still reach it
constexpr float LEAST_EXPONENT = -88;  // below it, exp_negative returns 0
constexpr int SECTIONS = 4;            // parts into which one pass splits a range of floors

inline int32_t bits_of(float number) { return load<int32_t>(&number); }
inline float float_of(int32_t bits) { return load<float>(&bits); }

// The contribution of a weight, given by its bits.
struct One {
  static ints of(ints) { return (ints)splat(1.f); }
};
struct Itself {
  static ints of(ints bits) { return bits; }
};

// The sum of contributions of the weights that reach a floor, given by its bits.
template <class Measure>
inline double measured(const float* weights, int64_t count, int32_t floor) {
  floats lanes{};
  for (int64_t i = 0; i < count; i += LANES) {
    const ints bits = load<ints>(weights + i);
    lanes += (floats)(Measure::of(bits) & (bits >= splat(floor)));
  }
  return pairwise_sum(lanes);
}

// Gathers the weights whose bits are in [low, end), padded with zeros to whole vectors.
struct Gathered {
  int64_t count;  // with the zeros
  int32_t least, most;
};
inline Gathered gather(const float* weights, int64_t count, int32_t low, int32_t end, float* to) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += LANES) {
    const ints bits = load<ints>(weights + i);
    const uint32_t inside = at_least(bits, low) & ~at_least(bits, end);
    compress((int32_t*)to + found, inside, bits);
    found += __builtin_popcount(inside);
  }
  store(to + found, ints{});
  const int64_t whole = (found + LANES - 1) / LANES * LANES;
  // after negation and a flip of the sign bit, the smallest weight is the maximum, above the zeros
  ints least = splat(INT32_MIN), most{};
  for (int64_t i = 0; i < whole; i += LANES) {
    const ints bits = load<ints>(to + i);
    least = larger(least, -bits ^ INT32_MIN);
    most = larger(most, bits);
  }
  return {whole, -(largest(least) ^ INT32_MIN), largest(most)};
}

struct Found {
  int64_t place;
  double rest;  // the target minus the sum before that place
};

// The place at which the sum of weights first exceeds the target; if rounding has put the target at
// the end, the last place with any weight.
template <class Weight>
inline Found first_exceeding(double target, int64_t count, Weight weight) {
  Found found{0, 0};
  double sum = 0;
  for (int64_t i = 0; i < count; i++) {
    const double own = weight(i);
    if (own == 0) continue;
    found = {i, target - sum};
    sum += own;
    if (sum > target) break;
  }
  return found;
}

// Chooses one token after another, in its own buffers: at most two rows of weights.
template <class Values>
class Sampler {
 public:
  explicit Sampler(int64_t vocab_size) : row_(vocab_size) {}

  // Returns a token, or NONE_CHOSEN if the largest logit is infinite or any logit is NaN.
  int64_t choose(const uint8_t* row, const Choice& choice) {
    row_.read(row);
    if (!std::isfinite(row_.largest())) return NONE_CHOSEN;
    return choice.temperature > 0 ? draw(choice) : row_.first_of_largest();
  }

 private:
  int64_t draw(const Choice& choice) {
    const bool has_top_k = 0 < choice.top_k && choice.top_k < row_.size();
    const float factor = 1 / std::max(choice.temperature, LEAST_TEMPERATURE);
    // tokens with an exponent below this are dropped
    float least = LEAST_EXPONENT;
    if (has_top_k) least = std::max(least, exponent(row_.reached_by(choice.top_k), factor));
    // top_p is a fraction of the weights that top_k keeps, independent of min_p
    if (choice.top_p == 1) least = std::max(least, (float)std::log(choice.min_p));
    least -= 10 * ROUNDING;
    weigh(factor, least);

    if (has_top_k) keep(floor_for<One>(choice.top_k, std::exp(least)) * (1 - ROUNDING));
    if (choice.top_p < 1) {
      const double total = sum_of_all();
      // all tokens of smaller weight together may be dropped
      const float lightest = total * (1 - choice.top_p) / row_.size();
      keep(floor_for<Itself>(choice.top_p * total, std::max(floor_, lightest)));
    }
    if (choice.min_p > 0) keep(choice.min_p * (1 - ROUNDING));
    return invert(choice.uniform);
  }

  float exponent(float logit, float factor) const { return (logit - row_.largest()) * factor; }

  // Computes the weights of every block that has a token with such an exponent.
  void weigh(float factor, float least) {
    if (!weights_) {
      const int64_t vectors = row_.blocks() * BLOCK / LANES;
      weights_.reset(new floats[vectors]);
      gathered_.reset(new floats[vectors + 1]);
    }
    blocks_.clear();
    sums_.clear();
    floor_ = 0;
    const floats most = splat(row_.largest());
    for (int64_t b = 0; b < row_.blocks(); b++) {
      if (exponent(row_.largest(b), factor) < least) continue;
      float* weights = weights_of(blocks_.size());
      floats sum{};
      for (int64_t i = 0; i < BLOCK; i += LANES) {
        const floats own = exp_negative((row_.vector(b, i) - most) * splat(factor));
        store(weights + i, own);
        sum += own;
      }
      blocks_.push_back(b);
      sums_.push_back(pairwise_sum(sum));
    }
  }

  // Raises the floor.
  void keep(double floor) {
    floor_ = std::max(floor_, (float)floor);
    for (size_t b = 0; b < blocks_.size(); b++)
      sums_[b] = measured<Itself>(weights_of(b), BLOCK, bits_of(floor_));
  }

  // The largest weight of at least `least` such that the weights that reach it contribute `wanted`;
  // the smallest weight of at least `least` if none does.
  template <class Measure>
  float floor_for(double wanted, float least) {
    // non-negative floats are ordered as their bits; the floor's bits are in [low, end)
    int32_t low = bits_of(least), end = bits_of(1.f) + 1;
    const float* weights = weights_of(0);
    int64_t count = (int64_t)blocks_.size() * BLOCK;
    double above = 0;  // contribution of weights from `end` on
    while (true) {
      int32_t bounds[SECTIONS + 1];
      double sums[SECTIONS + 1] = {};  // contribution from each bound on
      for (int s = 0; s <= SECTIONS; s++) bounds[s] = low + (int64_t)(end - low) * s / SECTIONS;
      for (int64_t i = 0; i < count; i += BLOCK)
        for (int s = 1; s < SECTIONS; s++)
          sums[s] += measured<Measure>(weights + i, std::min(BLOCK, count - i), bounds[s]);
      int section = SECTIONS - 1;
      while (section > 0 && above + sums[section] < wanted) section--;
      above += sums[section + 1];
      end = bounds[section + 1];
      const Gathered inside = gather(weights, count, bounds[section], end, gathered());
      // by rounding, `wanted` may exceed the sum of all sections; the lowest may then be empty
      if (!inside.count) return float_of(end);
      if (inside.least == inside.most) return float_of(inside.least);
      weights = gathered();
      count = inside.count;
      low = inside.least;
      end = inside.most + 1;
    }
  }

  int64_t invert(double uniform) const {
    const auto block_sum = [&](int64_t b) { return sums_[b]; };
    const Found block = first_exceeding(uniform * sum_of_all(), blocks_.size(), block_sum);
    const float* weights = weights_of(block.place);
    const auto weight = [&](int64_t i) { return weights[i] < floor_ ? 0 : weights[i]; };
    return blocks_[block.place] * BLOCK + first_exceeding(block.rest, BLOCK, weight).place;
  }

  double sum_of_all() const {
    double total = 0;
    for (double sum : sums_) total += sum;
    return total;
  }

  float* weights_of(int64_t block) const { return (float*)weights_.get() + block * BLOCK; }
  float* gathered() const { return (float*)gathered_.get(); }

  LogitsRow<Values> row_;
  std::unique_ptr<floats[]> weights_;   // weights of the kept blocks, concatenated
  std::unique_ptr<floats[]> gathered_;  // some of these weights
  std::vector<int64_t> blocks_;         // the kept blocks
  std::vector<double> sums_;            // per kept block, of the weights that reach the floor
  float floor_ = 0;
};

template <class Values>
inline void sample(const Logits& logits, const Choice* choices, int64_t* chosen,
                   Progress progress) {
  // rows take different times: a free thread takes the next row
  std::atomic<int64_t> next{0};
  in_parallel(logits.rows, [&](int64_t, int64_t) {
    Sampler<Values> sampler(logits.vocab_size);
    for (int64_t r = next++; r < logits.rows; r = next++) {
      chosen[r] = sampler.choose(logits.row<Values>(r), choices[r]);
      progress.mark();
    }
  });
}

}  // namespace memplus
