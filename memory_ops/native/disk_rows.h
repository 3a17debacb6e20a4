// Rows of a table in a file: a cache of the most-used rows, and concurrent reads of missing rows.
#pragma once

#include "clock.h"
#include "row_fetcher.h"
#include "row_reads.h"
#include "row_slots.h"

namespace memplus {

// Totals of a layer's lookups, in the order of table_statistics.py.
struct DiskCounts {
  int64_t requested;        // row ids of lookups
  int64_t lookups;
  int64_t unique;           // distinct rows per lookup, summed over lookups
  int64_t hits;             // unique rows that were in memory
  int64_t late;             // unique rows whose read was in flight
  int64_t misses;           // unique rows that had to be read
  int64_t bytes;            // bytes read
  int64_t prefetched;       // rows prefetched by hints
  int64_t prefetched_used;  // prefetched rows that a lookup used
  int64_t stall_ns;         // time spent waiting for reads
};

constexpr size_t LOST_AFTER = 8;   // different rows that failed, without a success in between
constexpr int64_t NO_LAYER = -1;   // of reads that no layer asked for
constexpr int MOST_REFUSED = 256;  // hinted rows without a slot, because each search takes time
constexpr int64_t PATIENCE_NS = std::chrono::nanoseconds(PATIENCE).count();

// One thread calls it. Another thread may call `read_ended` with the lock held: see RowReads.
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

  // Finds slots for the rows of as many tokens as fit, and starts reads of missing rows. Returns
  // the number of these tokens; their slots stay pinned until `release`. If a row id is outside
  // the table, pins nothing and returns -1 - index. If prefetches pin all slots for longer than
  // PATIENCE, returns NOT_STARTED; the caller then calls again. `is_new` marks the first part of a
  // lookup.
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
    patient_until_ = monotonic_ns() + PATIENCE_NS;
    for (int64_t token = 0; token < tokens; token++) {
      const int64_t first = token * token_rows;
      for (int64_t i = first; i < first + token_rows; i++) {
        slots[i] = wanted_slot(rows[i], lock);
        if (slots[i] == NO_SLOT) {
          const bool may_end = num_unclaimed_ > 0;
          for (int64_t j = first; j < i; j++) unclaim((int32_t)slots[j]);
          reads_.begin();
          return token || !may_end ? token : NOT_STARTED;
        }
      }
    }
    reads_.begin();
    return tokens;
  }

  // Waits until all these slots have their rows and returns ALL_THERE. If a row could not be read,
  // returns its index, and its errno (0: the file ends before it). Returns STILL_READING about
  // every PATIENCE while reads complete or are retried; the caller then calls again.
  int64_t finish(const int64_t* slots, int64_t count, int64_t layer, int* error) {
    RowReads::Lock lock = reads_.lock();
    count_for(layer);
    reads_.collect();
    const int64_t patient_until = monotonic_ns() + PATIENCE_NS, before = reads_.num_events();
    for (int64_t i = 0; i < count; i++) {
      const uint8_t& state = states_[slots[i]];
      while (state == WANTED && wait(lock)) {
        const bool has_progress = reads_.num_events() > before;
        if (state == WANTED && has_progress && monotonic_ns() > patient_until) return STILL_READING;
      }
      if (state == READY || state == PREFETCHED) continue;
      *error = state == FAILED ? errors_[slots[i]] : reads_.error();
      return i;
    }
    return ALL_THERE;
  }

  void release(const int64_t* slots, int64_t count) {
    RowReads::Lock lock = reads_.lock();
    for (int64_t i = 0; i < count; i++) unclaim((int32_t)slots[i]);
  }

  // Prefetches rows without waiting. Evicts only rows that were used at most once, or no more often
  // than the new row. Leaves some buffers to the reads of lookups.
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
      stamps_[slot] = 0;  // the stamp belongs to the evicted row
      num_unclaimed_++;
      counted().prefetched++;
      read(rows[i], slot);
    }
    reads_.begin();
  }

  // Reads rows into slots that were never used, in this order, and waits for them. Evicts no row and
  // counts no statistics; each row counts as used once. Ignores rows outside the table and failed
  // reads, which a lookup of the row tries again.
  void fill(const int64_t* rows, int64_t count) {
    RowReads::Lock lock = reads_.lock();
    layer_ = NO_LAYER;
    reads_.collect();
    bool is_ok = true;
    for (int64_t i = 0; i < count && is_ok; i++) {
      if ((uint64_t)rows[i] >= (uint64_t)from_.num_rows || slots_.find(rows[i]) != NO_SLOT) continue;
      const int32_t slot = slots_.take_empty(rows[i]);
      if (slot == NO_SLOT) break;
      slots_.use(rows[i]);
      states_[slot] = WANTED;
      stamps_[slot] = 0;
      num_unclaimed_++;
      read(rows[i], slot);
      while (!reads_.has_room() && is_ok) is_ok = reads_.wait(lock);
    }
    reads_.begin();
    while (num_unclaimed_ && is_ok) is_ok = reads_.wait(lock);
  }

  // Whether reads of LOST_AFTER different rows failed with permanent errors since the last success;
  // `error` is the last errno (0: the file ends before the row). One damaged row is not enough.
  bool is_lost(int* error) {
    RowReads::Lock lock = reads_.lock();
    reads_.collect();
    *error = last_error_;
    return failed_rows_.size() >= LOST_AFTER;
  }

  // Number of layers, up to the last one that used the table.
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

  // A pinned slot that has the row or will receive it; NO_SLOT if all slots stay pinned.
  int32_t wanted_slot(int64_t row, RowReads::Lock& lock) {
    int32_t slot = slots_.find(row);
    if (slot == NO_SLOT) {
      slots_.use(row);
      slot = slots_.take(row);
      // a prefetch in flight pins its slot, so wait until one completes
      while (slot == NO_SLOT && num_unclaimed_ && monotonic_ns() < patient_until_ && wait(lock))
        slot = slots_.take(row);
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

  // Pin and unpin a slot for a lookup. A read in flight holds one more pin.
  void claim(int32_t slot) {
    num_unclaimed_ -= is_unclaimed(slot);
    slots_.pin(slot);
  }
  void unclaim(int32_t slot) {
    slots_.unpin(slot);
    num_unclaimed_ += is_unclaimed(slot);
  }
  bool is_unclaimed(int32_t slot) const {
    return (states_[slot] == WANTED || states_[slot] == HINTED) && slots_.pins(slot) == 1;
  }

  // The slot stays pinned until the read ends, also while the read waits for a buffer.
  void read(int64_t row, int32_t slot) {
    slots_.pin(slot);
    reads_.add({row, slot, layer_});
  }
  bool wait(RowReads::Lock& lock) {
    const int64_t begun = monotonic_ns(), layer = layer_;
    const bool is_ok = reads_.wait(lock);
    counts_[layer].stall_ns += monotonic_ns() - begun;
    return is_ok;
  }

  void read_ended(const RowRead& read, const uint8_t* bytes, int error) override {
    if (read.layer != NO_LAYER) counts_[read.layer].bytes += read.bytes;
    num_unclaimed_ -= is_unclaimed(read.slot);
    uint8_t& state = states_[read.slot];
    if (bytes) {
      std::memcpy(memory_ + read.slot * from_.row_bytes, bytes, from_.row_bytes);
      state = state == HINTED ? PREFETCHED : READY;
    } else {
      fail(read.slot, error);
    }
    slots_.unpin(read.slot);
    record_outcome(read.row, bytes, error);
  }
  // Collects the different rows that failed since the last success. Ignores transient errors, which
  // say nothing about the file.
  void record_outcome(int64_t row, bool is_read, int error) {
    if (is_read) failed_rows_.clear();
    if (is_read || is_transient(error)) return;
    last_error_ = error;
    const bool is_new = std::find(failed_rows_.begin(), failed_rows_.end(), row) == failed_rows_.end();
    if (is_new && failed_rows_.size() < LOST_AFTER) failed_rows_.push_back(row);
  }
  // Empties the slot, so that the next lookup reads the row again.
  void fail(int32_t slot, int error) {
    slots_.forget(slot);
    states_[slot] = FAILED;
    errors_[slot] = error;
  }

  const RowFile from_;
  uint8_t* const memory_;  // [slots, row_bytes]
  RowSlots slots_;
  std::vector<uint8_t> states_;   // by slot
  std::vector<int> errors_;       // by slot: errno of a failed read
  std::vector<int64_t> stamps_;   // by slot: the last lookup that used it
  std::vector<int64_t> failed_rows_;
  int last_error_ = 0;              // of failed_rows_
  int64_t stamp_ = 0;               // number of the current lookup
  int64_t num_unclaimed_ = 0;       // reads in flight of rows that no lookup has pinned
  int64_t patient_until_ = 0;       // how long `start` waits for a slot
  int64_t layer_ = 0;               // of the current lookup
  std::vector<DiskCounts> counts_;  // by layer
  RowReads reads_;                  // last, because its destructor may call read_ended
};

}  // namespace memplus
