// Rows of a table that lies in a file: those that are used often are kept in memory, the others are
// read when they are asked for, many at once.
#pragma once

#include <time.h>

#include "row_fetcher.h"
#include "row_reads.h"
#include "row_slots.h"

namespace memplus {

// Totals of a layer's lookups; the order is that of table_statistics.py.
struct DiskCounts {
  int64_t requested;        // row ids of lookups
  int64_t lookups;
  int64_t unique;           // rows of lookups, each counted once a lookup
  int64_t hits;             // of these, that were there
  int64_t late;             // that were being read already
  int64_t misses;           // that had to be asked for
  int64_t bytes;            // read
  int64_t prefetched;       // rows asked for by hints
  int64_t prefetched_used;  // of these, that a lookup then wanted
  int64_t stall_ns;         // waited for reads
};

constexpr size_t LOST_AFTER = 8;   // different rows that could not be read, one after another
constexpr int MOST_REFUSED = 256;  // guesses that find no room; each takes some looking
constexpr int64_t PATIENCE_NS = std::chrono::nanoseconds(PATIENCE).count();

// One thread calls it. `read_ended` may come from another, which holds the lock: see RowReads.
class DiskRows final : RowReadsOwner {
 public:
  DiskRows(RowFile from, uint8_t* memory, int64_t num_slots, unsigned depth, int64_t retry_ms,
           std::unique_ptr<Reads> reads)
      : from_(from),
        memory_(memory),
        slots_(num_slots, from.num_rows),
        states_(num_slots),
        errors_(num_slots),
        stamps_(num_slots),
        reads_(from, depth, retry_ms, std::move(reads), *this) {}
  DiskRows(const DiskRows&) = delete;

  bool has_buffers() const { return reads_.has_buffers(); }

  // Finds slots for the rows of as many of the tokens as there is room for, and begins to read those
  // that are missing. Returns how many tokens, whose slots are pinned until `release`; -1 - index
  // where a row id lies outside the table, and then none are. A lookup `is_new` with its first part.
  int64_t start(const int64_t* rows, int64_t tokens, int64_t token_rows, bool is_new, int64_t layer,
                int64_t* slots) {
    RowReads::Lock lock = reads_.lock();
    count_for(layer);
    reads_.collect();
    for (int64_t i = 0; i < tokens * token_rows; i++)
      if ((uint64_t)rows[i] >= (uint64_t)from_.num_rows) return -1 - i;
    if (is_new) {
      stamp_++;
      counted().lookups++;
      counted().requested += tokens * token_rows;
    }
    for (int64_t token = 0; token < tokens; token++) {
      const int64_t first = token * token_rows;
      for (int64_t i = first; i < first + token_rows; i++) {
        slots[i] = wanted_slot(rows[i], lock);
        if (slots[i] == NO_SLOT) {
          for (int64_t j = first; j < i; j++) give_up((int32_t)slots[j]);
          reads_.begin();
          return token;
        }
      }
    }
    reads_.begin();
    return tokens;
  }

  // Waits until all these slots have their rows: ALL_THERE, or the index of one that could not be
  // read, and its errno (0: the file ends before it); or STILL_READING, to be called again, as long
  // as reads end or are retried.
  int64_t finish(const int64_t* slots, int64_t count, int64_t layer, int* error) {
    RowReads::Lock lock = reads_.lock();
    count_for(layer);
    reads_.collect();
    const int64_t patient_until = now_ns() + PATIENCE_NS, before = reads_.num_events();
    for (int64_t i = 0; i < count; i++) {
      const uint8_t& state = states_[slots[i]];
      while (state == WANTED && wait(lock)) {
        const bool gets_on = reads_.num_events() > before;
        if (state == WANTED && gets_on && now_ns() > patient_until) return STILL_READING;
      }
      if (state == READY || state == PREFETCHED) continue;
      *error = state == FAILED ? errors_[slots[i]] : reads_.error();
      return i;
    }
    return ALL_THERE;
  }

  void release(const int64_t* slots, int64_t count) {
    RowReads::Lock lock = reads_.lock();
    for (int64_t i = 0; i < count; i++) give_up((int32_t)slots[i]);
  }

  // Begins to read rows that may be wanted soon, as far as that goes without waiting, in place of
  // rows used once, or no more often than they were, and with some reads left for wanted rows.
  void hint(const int64_t* rows, int64_t count, int64_t layer) {
    RowReads::Lock lock = reads_.lock();
    count_for(layer);
    reads_.collect();
    int refused = 0;
    for (int64_t i = 0; i < count && refused < MOST_REFUSED && reads_.has_room(); i++) {
      if ((uint64_t)rows[i] >= (uint64_t)from_.num_rows || slots_.find(rows[i]) != NO_SLOT) continue;
      const int32_t slot = slots_.take_for_guess(rows[i]);
      refused += slot == NO_SLOT;
      if (slot == NO_SLOT) continue;
      states_[slot] = HINTED;
      stamps_[slot] = 0;  // it is another row's
      num_unclaimed_++;
      counted().prefetched++;
      read(rows[i], slot);
    }
    reads_.begin();
  }

  // Whether the last reads all failed for good, those of LOST_AFTER different rows at least; then
  // the errno of the last (0: the file ends before it). One damaged row is never enough.
  bool is_lost(int* error) {
    RowReads::Lock lock = reads_.lock();
    reads_.collect();
    *error = last_error_;
    return failed_rows_.size() >= LOST_AFTER;
  }

  // Layers from 0 to the last that has asked.
  int64_t num_layers() {
    RowReads::Lock lock = reads_.lock();
    return (int64_t)counts_.size();
  }
  DiskCounts counts(int64_t layer) {
    RowReads::Lock lock = reads_.lock();
    return counts_[layer];
  }

 private:
  enum State : uint8_t { READY, PREFETCHED, HINTED, WANTED, FAILED };

  void count_for(int64_t layer) {
    layer_ = layer;
    if (layer >= (int64_t)counts_.size()) counts_.resize(layer + 1);
  }
  DiskCounts& counted() { return counts_[layer_]; }

  static int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000 + time.tv_nsec;
  }

  // A pinned slot that has the row, or will; NO_SLOT where all are pinned.
  int32_t wanted_slot(int64_t row, RowReads::Lock& lock) {
    int32_t slot = slots_.find(row);
    if (slot == NO_SLOT) {
      slots_.use(row);
      slot = slots_.take(row);
      // what no lookup waits for has no claim to room once it is there
      while (slot == NO_SLOT && num_unclaimed_ && wait(lock)) slot = slots_.take(row);
      if (slot == NO_SLOT) return slot;
      claim(slot);
      stamps_[slot] = stamp_;
      states_[slot] = WANTED;
      counted().unique++;
      counted().misses++;
      read(row, slot);
      return slot;
    }
    claim(slot);
    if (stamps_[slot] == stamp_) return slot;
    stamps_[slot] = stamp_;
    counted().unique++;
    slots_.use(row);
    const uint8_t state = states_[slot];
    if (state == HINTED) {
      states_[slot] = WANTED;
      counted().late++;
      counted().prefetched_used++;
    } else if (state == WANTED) {
      counted().late++;
    } else {
      counted().hits++;
      counted().prefetched_used += state == PREFETCHED;
      states_[slot] = READY;
    }
    return slot;
  }

  // Pins a slot for a lookup, and unpins it. One that is read has a pin more, until its read ends.
  void claim(int32_t slot) {
    num_unclaimed_ -= is_unclaimed(slot);
    slots_.pin(slot);
  }
  void give_up(int32_t slot) {
    slots_.unpin(slot);
    num_unclaimed_ += is_unclaimed(slot);
  }
  bool is_unclaimed(int32_t slot) const {
    return (states_[slot] == WANTED || states_[slot] == HINTED) && slots_.pins(slot) == 1;
  }

  // A slot stays pinned until its read has ended, one that waits for a buffer included.
  void read(int64_t row, int32_t slot) {
    slots_.pin(slot);
    reads_.add({row, slot, layer_});
  }
  bool wait(RowReads::Lock& lock) {
    const int64_t begun = now_ns(), layer = layer_;
    const bool is_well = reads_.wait(lock);
    counts_[layer].stall_ns += now_ns() - begun;
    return is_well;
  }

  void read_ended(const RowRead& read, const uint8_t* bytes, int error) override {
    counts_[read.layer].bytes += read.bytes;
    num_unclaimed_ -= is_unclaimed(read.slot);
    uint8_t& state = states_[read.slot];
    if (bytes) {
      std::memcpy(memory_ + read.slot * from_.row_bytes, bytes, from_.row_bytes);
      state = state == HINTED ? PREFETCHED : READY;
    } else {
      fail(read.slot, error);
    }
    slots_.unpin(read.slot);
    note(read.row, bytes, error);
  }
  // Remembers different rows that failed since the last that was read. An error that may pass by
  // itself says nothing about the file.
  void note(int64_t row, bool is_read, int error) {
    if (is_read) failed_rows_.clear();
    if (is_read || is_transient(error)) return;
    last_error_ = error;
    const bool is_new = std::find(failed_rows_.begin(), failed_rows_.end(), row) == failed_rows_.end();
    if (is_new && failed_rows_.size() < LOST_AFTER) failed_rows_.push_back(row);
  }
  // The slot has no row; who asks again reads again.
  void fail(int32_t slot, int error) {
    slots_.forget(slot);
    states_[slot] = FAILED;
    errors_[slot] = error;
  }

  const RowFile from_;
  uint8_t* const memory_;  // [slots, row_bytes]
  RowSlots slots_;
  std::vector<uint8_t> states_;   // of slots
  std::vector<int> errors_;       // of slots that failed, errnos
  std::vector<int64_t> stamps_;   // the last lookup that wanted each slot
  std::vector<int64_t> failed_rows_;
  int last_error_ = 0;              // of these
  int64_t stamp_ = 0;
  int64_t num_unclaimed_ = 0;       // reads of rows that no lookup has pinned
  int64_t layer_ = 0;               // whose lookup it is
  std::vector<DiskCounts> counts_;  // by layer
  RowReads reads_;                  // the last: it tells this until it ends
};

}  // namespace memplus
