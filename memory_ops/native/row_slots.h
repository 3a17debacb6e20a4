// Which rows of a table are in memory, and which of them make room for others.
#pragma once

#include <cstdint>
#include <vector>

namespace memplus {

constexpr int32_t NO_SLOT = -1;
// of the hand, after which it gives up a row however often that was used: no miss waits longer
constexpr int64_t PATIENT_STEPS = 4096;

// Rows by their ids, in slots. A row that is used counts its uses, to a limit; a hand that goes
// round takes one off each row that it passes and gives up the first that has none left. So rows
// that are used often stay, though many that are used once pass through. With a limit of 1 that is
// CLOCK, with 0 first in, first out.
class RowSlots {
 public:
  RowSlots(int64_t num_slots, int most_uses)
      : most_uses_((uint8_t)most_uses), rows_(num_slots, -1), uses_(num_slots), pins_(num_slots) {
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

  void use(int32_t slot) {
    if (uses_[slot] < most_uses_) uses_[slot]++;
  }

  // A slot with pins keeps its row.
  int32_t pins(int32_t slot) const { return pins_[slot]; }
  void pin(int32_t slot) { num_pinned_ += !pins_[slot]++; }
  void unpin(int32_t slot) { num_pinned_ -= !--pins_[slot]; }

  // A slot for a row that has none; its bytes are another row's yet. NO_SLOT if all are pinned.
  int32_t take(int64_t row) {
    if (num_pinned_ == size()) return NO_SLOT;
    for (int64_t step = 0; step < size() + PATIENT_STEPS; step++) {
      const int32_t slot = next();
      if (pins_[slot]) continue;
      if (!uses_[slot] || step >= PATIENT_STEPS) return give(slot, row);
      uses_[slot]--;
    }
    return NO_SLOT;
  }
  // The same from rows that have no uses left, which are not taken for it; NO_SLOT after so many
  // steps.
  int32_t take_unused(int64_t row, int64_t most_steps) {
    for (int64_t step = 0; step < most_steps; step++) {
      const int32_t slot = next();
      if (!pins_[slot] && !uses_[slot]) return give(slot, row);
    }
    return NO_SLOT;
  }

  // The slot has no row from now on: it could not be read.
  void forget(int32_t slot) {
    uint64_t place = home(rows_[slot]);
    while (places_[place] != slot) place = (place + 1) & mask_;
    rows_[slot] = -1;
    uses_[slot] = 0;
    // those behind move up, so that no search ends too early
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
  int32_t give(int32_t slot, int64_t row) {
    if (rows_[slot] >= 0) forget(slot);
    rows_[slot] = row;
    uint64_t place = home(row);
    while (places_[place] != NO_SLOT) place = (place + 1) & mask_;
    places_[place] = slot;
    return slot;
  }
  uint64_t home(int64_t row) const {
    return ((uint64_t)row * 0x9E3779B97F4A7C15ull >> 20) & mask_;
  }

  const uint8_t most_uses_;
  int32_t hand_ = 0;
  int64_t num_pinned_ = 0;  // slots, not pins
  uint64_t mask_;
  std::vector<int32_t> places_;  // slots, where their rows' ids lead
  std::vector<int64_t> rows_;    // -1 where there is none
  std::vector<uint8_t> uses_;
  std::vector<int32_t> pins_;
};

}  // namespace memplus
