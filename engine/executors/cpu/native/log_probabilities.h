// Log-probabilities of rows of logits: x[i] - log(sum of exp(x)), the rank of a given token, and
// the likeliest tokens.
#pragma once

#include <atomic>
#include <cmath>

#include "logits_row.h"
#include "progress.h"
#include "memory_ops/native/threads.h"

namespace memplus {

// The requested scores of rows of logits, and their outputs.
struct Scores {
  const int64_t *rows, *tokens;  // [count]
  int64_t count, num_best;       // num_best: likeliest tokens per row, at most the vocabulary
  float* own;                    // [count]
  int64_t* ranks;                // [count]
  int64_t* best;                 // [count, num_best], descending; ties by lower id
  float* values;                 // [count, num_best], log-probabilities of `best`
};

// Scores one row after another, in its own buffers.
template <class Values>
class Scorer {
 public:
  explicit Scorer(int64_t vocab_size) : row_(vocab_size) {}

  void score(const Logits& logits, const Scores& scores, int64_t i) {
    row_.read(logits.row<Values>(scores.rows[i]));
    const double total = log_sum();
    const float own = row_.at(scores.tokens[i]);
    scores.own[i] = own - total;
    scores.ranks[i] = 1 + count_above(own);
    if (!scores.num_best) return;
    find_best(scores.num_best);
    for (int64_t n = 0; n < scores.num_best; n++) {
      scores.best[i * scores.num_best + n] = ~(uint32_t)found_[n];
      scores.values[i * scores.num_best + n] = number_of((int32_t)(found_[n] >> 32)) - total;
    }
  }

 private:
  double log_sum() const {
    const float most = row_.largest();
    if (!std::isfinite(most)) return most;
    double sum = 0;
    for (int64_t b = 0; b < row_.blocks(); b++) {
      floats lanes{};
      for (int64_t i = 0; i < BLOCK; i += LANES)
        lanes += exp_negative(row_.vector(b, i) - splat(most));
      sum += pairwise_sum(lanes);
    }
    return most + std::log(sum);
  }

  int64_t count_above(float own) const {
    int64_t count = 0;
    for (int64_t b = 0; b < row_.blocks(); b++) {
      if (row_.largest(b) <= own) continue;
      ints lanes{};
      for (int64_t i = 0; i < BLOCK; i += LANES) lanes -= row_.vector(b, i) > splat(own);
      for (int lane = 0; lane < LANES; lane++) count += lanes[lane];
    }
    return count;
  }

  // Packs a logit and its place into one number that sorts by logit, then by place.
  void find_best(int64_t count) {
    const float least = row_.reached_by(count);
    const int32_t bound = ordered(splat(least))[0];
    found_.clear();
    for (int64_t b = 0; b < row_.blocks(); b++) {
      if (row_.largest(b) < least) continue;
      for (int64_t i = 0; i < BLOCK; i += LANES) {
        const ints logits = ordered(row_.vector(b, i));
        for (uint32_t bits = at_least(logits, bound); bits; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          const uint32_t place = b * BLOCK + i + lane;
          found_.push_back((int64_t)((uint64_t)(uint32_t)logits[lane] << 32 | ~place));
        }
      }
    }
    std::partial_sort(found_.begin(), found_.begin() + count, found_.end(), std::greater<>());
  }

  LogitsRow<Values> row_;
  std::vector<int64_t> found_;
};

template <class Values>
inline void log_probabilities(const Logits& logits, const Scores& scores, Progress progress) {
  std::atomic<int64_t> next{0};
  in_parallel(scores.count, [&](int64_t, int64_t) {
    Scorer<Values> scorer(logits.vocab_size);
    for (int64_t i = next++; i < scores.count; i = next++) {
      scorer.score(logits, scores, i);
      progress.mark();
    }
  });
}

}  // namespace memplus
