// Cache slots: maps row ids to slots, and evicts the least-used rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace memplus {

constexpr int32_t NO_SLOT = -1;
constexpr int CANDIDATES = 16;       // rows compared for one eviction
constexpr int64_t MOST_STEPS = 64;   // of the hand, after it found a slot that is not pinned
constexpr int64_t AGING_ROUNDS = 8;  // replacements per slot until all use counts are halved once

// Counts the uses of every row of the table, in memory or not. To place a new row, a clock hand
// examines some slots and evicts the row with the fewest uses. So often-used rows stay in memory,
// and keep their counts if they are evicted and return. Each placement halves the counts of a few
// rows, so that old uses fade.
class RowSlots {
 public:
  RowSlots(int64_t num_slots, int64_t num_rows)
      : rows_(num_slots, -1),
        pins_(num_slots),
        num_words_((num_rows + 7) / 8),
        // calloc gets zero pages from the kernel, which take no memory until they are written
        uses_((uint64_t*)std::calloc(num_words_, 8), std::free) {
    if (!uses_) throw std::bad_alloc();
    uint64_t places = 16;
    while (places < 2 * (uint64_t)num_slots) places *= 2;
    mask_ = places - 1;
    places_.assign(places, NO_SLOT);
  }

  int64_t size() const { return (int64_t)rows_.size(); }

  // The slot of a row, or NO_SLOT.
  int32_t find(int64_t row) const {
    for (uint64_t place = home(row);; place = (place + 1) & mask_) {
      const int32_t slot = places_[place];
      if (slot == NO_SLOT || rows_[slot] == row) return slot;
    }
  }

  void use(int64_t row) { uses(row) += uses(row) < UINT8_MAX; }

  // A slot with pins keeps its row.
  int32_t pins(int32_t slot) const { return pins_[slot]; }
  void pin(int32_t slot) { num_pinned_ += !pins_[slot]++; }
  void unpin(int32_t slot) { num_pinned_ -= !--pins_[slot]; }

  // Assigns a slot to a row that has none; its bytes are still the old row's. NO_SLOT if all slots
  // are pinned.
  int32_t take(int64_t row) {
    const int32_t slot = least_used();
    if (slot == NO_SLOT) return slot;
    assign(slot, row);
    return slot;
  }
  // The same for a predicted row: NO_SLOT instead of evicting a row that was used more than once
  // and more often than the predicted one.
  int32_t take_for_guess(int64_t row) {
    const int32_t slot = least_used();
    if (slot == NO_SLOT) return slot;
    if (has_row(slot) && uses(rows_[slot]) > std::max<int>(1, uses(row))) return NO_SLOT;
    assign(slot, row);
    return slot;
  }

  // The same for an empty slot: NO_SLOT instead of an eviction.
  int32_t take_empty(int64_t row) {
    if (num_filled_ == size()) return NO_SLOT;
    assign(num_filled_, row);
    return num_filled_++;
  }

  // Empties a slot, for example because its row could not be read.
  void forget(int32_t slot) {
    uint64_t place = home(rows_[slot]);
    while (places_[place] != slot) place = (place + 1) & mask_;
    rows_[slot] = -1;
    // close the gap in the hash table, so that no search ends too early
    for (uint64_t next = place;;) {
      next = (next + 1) & mask_;
      if (places_[next] == NO_SLOT) break;
      const uint64_t wanted = home(rows_[places_[next]]);
      if (((next - wanted) & mask_) < ((next - place) & mask_)) continue;
      places_[place] = places_[next];
      place = next;
    }
    places_[place] = NO_SLOT;
  }

 private:
  int32_t next() {
    const int32_t slot = hand_;
    hand_ = hand_ + 1 == size() ? 0 : hand_ + 1;
    return slot;
  }
  // An unused slot, else the least-used of the slots that the hand reaches next.
  int32_t least_used() {
    if (num_filled_ < size()) return num_filled_++;
    int32_t best = NO_SLOT;
    int best_uses = INT32_MAX, candidates = 0;
    if (num_pinned_ == size()) return best;
    for (int64_t step = 0; candidates < CANDIDATES && step < size(); step++) {
      if (candidates && step >= MOST_STEPS) break;
      const int32_t slot = next();
      if (pins_[slot]) continue;
      candidates++;
      const int own = has_row(slot) ? uses(rows_[slot]) : -1;
      if (own < best_uses) best = slot, best_uses = own;
    }
    return best;
  }
  // Halves the use counts of the next few rows, eight at a time.
  void age() {
    for (due_ += num_words_; due_ >= AGING_ROUNDS * size(); due_ -= AGING_ROUNDS * size()) {
      uint64_t& eight = uses_[aged_];
      if (eight) eight = eight >> 1 & 0x7f7f7f7f7f7f7f7f;
      aged_ = aged_ + 1 == num_words_ ? 0 : aged_ + 1;
    }
  }
  bool has_row(int32_t slot) const { return rows_[slot] >= 0; }
  uint8_t& uses(int64_t row) const { return ((uint8_t*)uses_.get())[row]; }

  void assign(int32_t slot, int64_t row) {
    if (has_row(slot)) forget(slot);
    rows_[slot] = row;
    uint64_t place = home(row);
    while (places_[place] != NO_SLOT) place = (place + 1) & mask_;
    places_[place] = slot;
    age();
  }
  uint64_t home(int64_t row) const {
    return ((uint64_t)row * 0x9E3779B97F4A7C15ull >> 20) & mask_;
  }

  int32_t hand_ = 0, num_filled_ = 0;
  int64_t num_pinned_ = 0;  // slots, not pins
  uint64_t mask_;
  std::vector<int32_t> places_;  // hash table of slots, by row id
  std::vector<int64_t> rows_;    // row id by slot, -1 for an empty slot
  std::vector<int32_t> pins_;
  const int64_t num_words_;
  const std::unique_ptr<uint64_t[], decltype(&std::free)> uses_;  // one byte per row of the table
  int64_t aged_ = 0;  // the next word to halve
  int64_t due_ = 0;   // the fraction of a word that is due, times AGING_ROUNDS * size()
};

}  // namespace memplus
