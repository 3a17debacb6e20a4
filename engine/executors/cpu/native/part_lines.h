// The keys and values of a part as lines of the products in product.h.
#pragma once

#include <algorithm>
#include <utility>

#include "kept.h"
#include "key_parts.h"
#include "kv_areas.h"
#include "product.h"

namespace memplus {

// Lines of numbers of BYTES bytes, for products that read STEPS lines together. They lie in the KV
// blocks. If their sizes are not multiples of vectors, or if the product needs a constant stride,
// they are copied to a buffer.
template <int64_t BYTES, int64_t STEPS>
class PartLines {
  using Areas = KvAreas<BYTES>;
  static constexpr int64_t LINE_TOKENS = Areas::LINE_TOKENS;

 public:
  using Part = KeyPart<std::max<int64_t>(LANES, LINE_TOKENS * STEPS)>;

  explicit PartLines(const Attention& call)
      : areas_(call),
        key_steps_(rounded_up(call.head_dim / LINE_TOKENS, STEPS)),
        out_vectors_((call.head_dim + LANES - 1) / LANES) {
    const int64_t copies =
        std::max(key_steps_ * PART_VECTORS, PART / LINE_TOKENS * out_vectors_);
    floats* free = kept_vectors<PartLines>(3 * out_vectors_ + copies);
    const auto take = [&](int64_t count) { return (uint8_t*)std::exchange(free, free + count); };
    nothing_ = take(out_vectors_);
    last_ = take(out_vectors_);
    columns_ = (const uint8_t**)take(out_vectors_);
    copies_ = take(copies);
    std::memset(nothing_, 0, line_bytes());
  }

  int64_t key_steps() const { return key_steps_; }      // lines of keys
  int64_t out_vectors() const { return out_vectors_; }  // vectors of a line of values

  // The part's keys, which are valid until the next call; the product prefetches those of the next
  // part.
  VectorLines keys(const Part& part, const Part& next) {
    const int64_t shown = part.shown() / LANES;
    const bool is_in_place = areas_.block_size % LANES == 0 &&
                             key_steps_ * LINE_TOKENS == areas_.head_dim;
    if (!is_in_place) copy_keys(part, next);
    for (int64_t v = 0; v < shown; v++) {
      lines_[v] = is_in_place ? part.keys[v * LANES / QUAD] : copies_ + v * sizeof(floats);
      fetched_[v] = v * LANES < next.count ? next.keys[v * LANES / QUAD] : lines_[v];
    }
    if (!is_in_place) return {lines_, nullptr, PART * WORD};
    return {lines_, fetched_, areas_.key_stride()};
  }

  // The part's values, which are valid until the next call; the product prefetches those of the next
  // part.
  PlacedLines values(const Part& part, const Part& next) {
    const int64_t shown = part.shown() / LINE_TOKENS;
    for (int64_t i = 0; i < shown; i++) {
      lines_[i] = line(part, i * LINE_TOKENS);
      fetched_[i] = i * LINE_TOKENS < next.count ? line_of(next, i * LINE_TOKENS) : lines_[i];
    }
    if (areas_.head_dim % LANES) copy_lines(shown);
    return {lines_, fetched_};
  }

  // Copies of the part's values, for products with tiles; prefetches those of the next part.
  VectorLines copied_values(const Part& part, const Part& next) {
    values(part, next);
    if (areas_.head_dim % LANES == 0) copy_lines(part.shown() / LINE_TOKENS);
    for (int64_t v = 0; v < out_vectors_; v++) columns_[v] = copies_ + v * sizeof(floats);
    return {columns_, nullptr, line_bytes()};
  }

 private:
  int64_t line_bytes() const { return out_vectors_ * (int64_t)sizeof(floats); }

  // Copies the part's keys, followed by words of 0 up to whole steps.
  void copy_keys(const Part& part, const Part& next) {
    const int64_t words = areas_.head_dim / LINE_TOKENS, quads = part.shown() / QUAD;
    for (int64_t step = 0; step < key_steps_; step++)
      for (int64_t quad = 0; quad < quads; quad++) {
        uint8_t* to = copies_ + (step * PART + quad * QUAD) * WORD;
        if (step < words)
          std::memcpy(to, part.keys[quad] + step * areas_.key_stride(), QUAD * WORD);
        else
          std::memset(to, 0, QUAD * WORD);
        if (step < words && quad * QUAD < next.count)
          __builtin_prefetch(next.keys[quad] + step * areas_.key_stride());
      }
  }

  void copy_lines(int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      uint8_t* to = copies_ + i * line_bytes();
      std::memcpy(to, lines_[i], areas_.head_dim * WORD);
      for (int64_t byte = 0; byte < line_bytes(); byte += LINE)
        __builtin_prefetch(fetched_[i] + byte);
      lines_[i] = fetched_[i] = to;
    }
  }

  const uint8_t* line_of(const Part& part, int64_t at) const {
    return part.lines[at / QUAD] + at % QUAD / LINE_TOKENS * areas_.head_dim * WORD;
  }

  // The line of a part's value. Missing values are 0, since a weight of 0 would not cancel a NaN.
  const uint8_t* line(const Part& part, int64_t at) {
    if (at >= part.count) return nothing_;
    const uint8_t* from = line_of(part, at);
    if (at + LINE_TOKENS <= part.count) return from;
    const uint32_t present = (1u << (part.count - at) * BYTES * 8) - 1;
    for (int64_t byte = 0; byte < areas_.head_dim * WORD; byte += WORD)
      store(last_ + byte, load<uint32_t>(from + byte) & present);
    return last_;
  }

  const Areas areas_;
  const int64_t key_steps_, out_vectors_;
  uint8_t *nothing_, *last_, *copies_;
  const uint8_t** columns_;  // of the copied lines of values
  const uint8_t *lines_[PART], *fetched_[PART];
};

}  // namespace memplus
