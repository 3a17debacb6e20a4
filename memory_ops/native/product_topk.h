// Product-key top-K of each token and head:
//
//   the top K of each half's scores; the top K of the sums of ranks (a + 1) * (b + 1) <= K; softmax
//
// The code avoids branches on comparisons of scores: on fresh scores half of them would be
// mispredicted.
#pragma once

#include <algorithm>
#include <memory>

#include "sort_network.h"
#include "threads.h"

namespace memplus {

constexpr int MOST_CHOSEN = 128;                 // largest K
constexpr int MOST_SORTED = 2 * MOST_CHOSEN;     // largest number of scores to sort
constexpr int MOST_PAIRS = 645;                  // candidate pairs for K = 128

// Chooses the best of up to `most` scores; owns the working memory.
class Chooser {
 public:
  explicit Chooser(int most)
      : ordered_(new int32_t[padded(most)]),
        survivors_(new int32_t[padded(most) + LANES]),
        places_(new int32_t[padded(most) + LANES]) {}

  // Writes the `k` best of `count` scores to `chosen`, in descending order of (score, -place). Each
  // packs score and place into one number.
  void choose(const float* scores, int count, int k, int64_t* chosen) {
    const int vectors = read(scores, count);
    const int32_t threshold = lower_bound(vectors, k);
    int found = collect(vectors, threshold);
    if (found > std::max(2 * k, LEAST_SORTED)) found = narrow(found, k);
    for (int i = 0; i < found; i++) chosen[i] = packed(survivors_[i], places_[i]);
    sort_descending(chosen, found);
  }

  static int place(int64_t chosen) { return (int)~(uint32_t)chosen; }
  static float score(int64_t chosen) { return number_of((int32_t)(chosen >> 32)); }

 private:
  static int padded(int count) { return (count + LANES - 1) / LANES * LANES; }

  static int64_t packed(int32_t score, int32_t place) {
    return (int64_t)((uint64_t)(uint32_t)score << 32 | (uint32_t)~place);
  }

  ints vector(int at) const { return load<ints>(&ordered_[at * LANES]); }

  int read(const float* scores, int count) {
    const int whole = count / LANES, left = count % LANES;
    for (int i = 0; i < whole; i++)
      store(&ordered_[i * LANES], ordered(load<floats>(scores + i * LANES)));
    if (!left) return whole;
    float last[LANES] = {};
    std::memcpy(last, scores + whole * LANES, left * sizeof(float));
    store(&ordered_[whole * LANES], ordered(load<floats>(last)));
    // below every score, -inf included
    for (int lane = left; lane < LANES; lane++) ordered_[whole * LANES + lane] = INT32_MIN;
    return whole + 1;
  }

  // A bound that at least `k` scores reach, but few more: the k-th largest maximum of about 2k
  // groups. A group is one lane of vectors i, i + groups, ...
  int32_t lower_bound(int vectors, int k) const {
    const int groups = std::min(vectors, (2 * k + LANES - 1) / LANES);
    ints maxima[MOST_SORTED / LANES];
    for (int group = 0; group < groups; group++) {
      ints most = vector(group);
      for (int i = group + groups; i < vectors; i += groups) most = larger(most, vector(i));
      maxima[group] = most;
    }
    return kth_largest([&](int i) { return maxima[i]; }, groups, k, k / 8);
  }

  // A number that at least `k` and at most `k + more` numbers reach; with ties, the k-th largest.
  template <class Vectors>
  static int32_t kth_largest(Vectors vector, int vectors, int k, int more) {
    // bit by bit from the top: finds the largest number that k numbers reach
    uint32_t bound = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
      const uint32_t tried = bound | bit;
      int reached = 0;
      for (int i = 0; i < vectors; i++)
        reached += __builtin_popcount(at_least(vector(i), signed_of(tried)));
      bound = reached >= k ? tried : bound;
      if (reached >= k && reached <= k + more) break;
    }
    return signed_of(bound);
  }

  static int32_t signed_of(uint32_t number) { return (int32_t)(number ^ 0x80000000u); }

  // Collects the scores that reach the threshold, in order of place; returns their number.
  int collect(int vectors, int32_t threshold) {
    const ints lanes = lane_numbers();
    int found = 0;
    for (int i = 0; i < vectors; i++) {
      const ints scores = vector(i);
      const uint32_t bits = at_least(scores, threshold);
      compress(&survivors_[found], bits, scores);
      compress(&places_[found], bits, lanes + i * LANES);
      found += __builtin_popcount(bits);
    }
    return found;
  }

  // Keeps exactly `k` survivors: ties can produce any number.
  int narrow(int found, int k) {
    const int vectors = padded(found) / LANES;
    for (int i = found; i < vectors * LANES; i++) survivors_[i] = INT32_MIN;
    const auto vector = [&](int i) { return load<ints>(&survivors_[i * LANES]); };
    const int32_t bound = kth_largest(vector, vectors, k, 0);
    int above = 0;
    for (int i = 0; i < found; i++) above += survivors_[i] > bound;
    int kept = 0, equals_left = k - above;
    for (int i = 0; i < found; i++) {
      if (survivors_[i] < bound || (survivors_[i] == bound && equals_left-- <= 0)) continue;
      survivors_[kept] = survivors_[i];
      places_[kept++] = places_[i];
    }
    return kept;
  }

  std::unique_ptr<int32_t[]> ordered_, survivors_, places_;
};

// Softmax of `k` descending scores; uniform if all are -inf.
inline void softmax(const float* scores, int k, float* weights) {
  float padded[MOST_CHOSEN + LANES];
  const float best = scores[0];
  const bool none = best == -__builtin_inff();
  floats total{};
  for (int at = 0; at < k; at += LANES) {
    float part[LANES];
    for (int lane = 0; lane < LANES; lane++)
      part[lane] = at + lane < k ? (none ? 0.f : scores[at + lane] - best) : -__builtin_inff();
    const floats powers = exp_negative(load<floats>(part));
    store(padded + at, powers);
    total += powers;
  }
  const float factor = 1.f / sum(total);
  for (int at = 0; at < k; at++) weights[at] = padded[at] * factor;
}

// The pairs of ranks (a, b) with (a + 1) * (b + 1) <= k, in order: no other pair can be chosen.
struct Pairs {
  explicit Pairs(int k) {
    for (int a = 0; a < k; a++)
      for (int b = 0; (a + 1) * (b + 1) <= k; b++, count++) {
        first[count] = (uint8_t)a;
        second[count] = (uint8_t)b;
      }
  }
  int count = 0;
  uint8_t first[MOST_PAIRS], second[MOST_PAIRS];
};

// Chooses for one head: `half_scores` are 2 x N, `rows` and `weights` K.
inline void product_topk(Chooser& chooser, const Pairs& pairs, const float* half_scores,
                         int num_subkeys, int k, int64_t* rows, float* weights) {
  alignas(LINE) int64_t halves[2][MOST_SORTED], best[MOST_SORTED];
  float scores[2][MOST_CHOSEN + LANES], sums[MOST_PAIRS + LANES];
  for (int half = 0; half < 2; half++) {
    chooser.choose(half_scores + half * num_subkeys, num_subkeys, k, halves[half]);
    for (int i = 0; i < k; i++) scores[half][i] = Chooser::score(halves[half][i]);
  }
  int written = 0;
  for (int a = 0; a < k; a++) {
    const int partners = k / (a + 1);
    for (int b = 0; b < partners; b += LANES)  // later stores overwrite the excess lanes
      store(sums + written + b, load<floats>(scores[1] + b) + scores[0][a]);
    written += partners;
  }
  chooser.choose(sums, pairs.count, k, best);
  float chosen[MOST_CHOSEN];
  for (int i = 0; i < k; i++) {
    const int pair = Chooser::place(best[i]);
    const int64_t first = Chooser::place(halves[0][pairs.first[pair]]);
    rows[i] = first * num_subkeys + Chooser::place(halves[1][pairs.second[pair]]);
    chosen[i] = Chooser::score(best[i]);
  }
  softmax(chosen, k, weights);
}

// Chooses for the heads [heads.first, heads.last).
inline void product_topk(const float* half_scores, Span heads, int num_subkeys, int k,
                         int64_t* rows, float* weights) {
  const Pairs pairs(k);
  Chooser chooser(std::max(num_subkeys, MOST_PAIRS));
  for (int64_t head = heads.first; head < heads.last; head++)
    product_topk(chooser, pairs, half_scores + head * 2 * num_subkeys, num_subkeys, k,
                 rows + head * k, weights + head * k);
}

inline void product_topk(const float* half_scores, int64_t num_heads, int num_subkeys, int k,
                         int64_t* rows, float* weights) {
  in_parallel(num_heads, [&](int64_t thread, int64_t threads) {
    product_topk(half_scores, piece(num_heads, thread, threads), num_subkeys, k, rows, weights);
  });
}

}  // namespace memplus
