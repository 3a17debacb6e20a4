// Rows of a table that lies in a file: those that are used often are kept in memory, the others are
// read when they are asked for, many at once.
#pragma once

#include <time.h>

#include <algorithm>
#include <deque>

#include "row_fetcher.h"
#include "row_file.h"
#include "row_slots.h"

namespace memplus {

// Totals of a layer's lookups; the order is that of disk_rows.py.
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

constexpr int MOST_TRIES = 3;  // of a read that ends too early
constexpr int64_t HINT_STEPS = 64;  // of the hand, for a row that is not wanted yet
constexpr int PUSHED_TOGETHER = 16;  // the disk begins while the next rows are looked for
constexpr int64_t PATIENCE_NS = 500'000'000;  // after which who waits is told that reads go on

class DiskRows {
 public:
  DiskRows(RowFile from, uint8_t* memory, int64_t num_slots, unsigned depth, int most_uses,
           std::unique_ptr<Reads> reads)
      : from_(from),
        memory_(memory),
        slots_(num_slots, most_uses),
        states_(num_slots),
        errors_(num_slots),
        stamps_(num_slots),
        reads_(std::move(reads)),
        buffer_bytes_(from.span_bytes()),
        buffers_((uint8_t*)std::aligned_alloc(4096, depth * buffer_bytes_)),
        under_way_(depth) {
    for (unsigned i = 0; i < depth; i++) free_.push_back(depth - 1 - i);
  }
  DiskRows(const DiskRows&) = delete;
  ~DiskRows() {
    waiting_.clear();
    // the kernel writes into the buffers until then; should it never say so, they are left to it
    while (free_.size() < under_way_.size() && wait_for_one()) {
    }
    if (free_.size() < under_way_.size()) {
      reads_.release();
      return;
    }
    reads_.reset();
    std::free(buffers_);
  }

  bool has_buffers() const { return buffers_; }

  // Finds slots for the rows of as many of the tokens as there is room for, and begins to read those
  // that are missing. Returns how many tokens, whose slots are pinned until `release`; -1 - index
  // where a row id lies outside the table, and then none are. A lookup `is_new` with its first part.
  int64_t start(const int64_t* rows, int64_t tokens, int64_t token_rows, bool is_new, int64_t layer,
                int64_t* slots) {
    count_for(layer);
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
        slots[i] = wanted_slot(rows[i]);
        if (slots[i] == NO_SLOT) {
          for (int64_t j = first; j < i; j++) slots_.unpin((int32_t)slots[j]);
          submit();
          return token;
        }
      }
    }
    submit();
    return tokens;
  }

  // Waits until all these slots have their rows: ALL_THERE, or the index of one that could not be
  // read, and its errno (0: the file ends before it); or STILL_READING, to be called again.
  int64_t finish(const int64_t* slots, int64_t count, int64_t layer, int* error) {
    count_for(layer);
    collect();
    const int64_t begun = now_ns();
    while (wanted_under_way_ && wait_for_one())
      if (wanted_under_way_ && now_ns() - begun > PATIENCE_NS) return STILL_READING;
    for (int64_t i = 0; i < count; i++) {
      const uint8_t state = states_[slots[i]];
      if (state == READY || state == PREFETCHED) continue;
      *error = state == FAILED ? errors_[slots[i]] : broken_;
      return i;
    }
    return ALL_THERE;
  }

  void release(const int64_t* slots, int64_t count) {
    for (int64_t i = 0; i < count; i++) slots_.unpin((int32_t)slots[i]);
  }

  // Begins to read rows that may be wanted soon, as far as that goes without waiting, in place of
  // rows that were not used, and with some reads left for rows that are wanted.
  void hint(const int64_t* rows, int64_t count, int64_t layer) {
    count_for(layer);
    collect();
    for (int64_t i = 0; i < count && free_.size() > under_way_.size() / 4; i++) {
      if ((uint64_t)rows[i] >= (uint64_t)from_.num_rows || slots_.find(rows[i]) != NO_SLOT) continue;
      const int32_t slot = slots_.take_unused(rows[i], HINT_STEPS);
      if (slot == NO_SLOT) break;
      states_[slot] = HINTED;
      stamps_[slot] = 0;  // it is another row's
      hinted_under_way_++;
      counted().prefetched++;
      read(rows[i], slot);
    }
    submit();
  }

  // Layers from 0 to the last that has asked.
  int64_t num_layers() const { return (int64_t)counts_.size(); }
  const DiskCounts& counts(int64_t layer) const { return counts_[layer]; }

 private:
  enum State : uint8_t { READY, PREFETCHED, HINTED, WANTED, FAILED };
  struct UnderWay {
    int64_t row;
    int32_t slot;
    int64_t layer;
    int tries;
  };

  void count_for(int64_t layer) {
    layer_ = layer;
    if (layer >= num_layers()) counts_.resize(layer + 1);
  }
  DiskCounts& counted() { return counts_[layer_]; }

  static int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000 + time.tv_nsec;
  }

  // A pinned slot that has the row, or will; NO_SLOT where all are pinned.
  int32_t wanted_slot(int64_t row) {
    int32_t slot = slots_.find(row);
    if (slot == NO_SLOT) {
      slot = slots_.take(row);
      // rows that were hinted at have no claim to room once they are there
      while (slot == NO_SLOT && hinted_under_way_ && wait_for_one())
        slot = slots_.take(row);
      if (slot == NO_SLOT) return slot;
      slots_.pin(slot);
      stamps_[slot] = stamp_;
      states_[slot] = WANTED;
      wanted_under_way_++;
      counted().unique++;
      counted().misses++;
      read(row, slot);
      return slot;
    }
    slots_.pin(slot);
    if (stamps_[slot] == stamp_) return slot;
    stamps_[slot] = stamp_;
    counted().unique++;
    slots_.use(slot);
    const uint8_t state = states_[slot];
    if (state == HINTED) {
      states_[slot] = WANTED;
      hinted_under_way_--;
      wanted_under_way_++;
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

  // A slot stays pinned until its read has ended, one that waits for a buffer included.
  void read(int64_t row, int32_t slot) {
    slots_.pin(slot);
    waiting_.push_back({row, slot, layer_, 1});
    push_waiting();
  }
  void push_waiting() {
    while (!free_.empty() && !waiting_.empty()) {
      const unsigned buffer = free_.back();
      free_.pop_back();
      under_way_[buffer] = waiting_.front();
      waiting_.pop_front();
      push(buffer);
      if (++pushed_ == PUSHED_TOGETHER) submit();
    }
  }
  void push(unsigned buffer) {
    uint8_t* const memory = buffers_ + buffer * buffer_bytes_;
    reads_->push(from_.read_of(under_way_[buffer].row, memory, buffer));
  }

  // Hands on what was pushed. False once the kernel takes nothing any more.
  bool submit(unsigned wanted = 0) {
    pushed_ = 0;
    if (!broken_) broken_ = reads_->submit(wanted);
    return !broken_;
  }
  // Waits until a read under way has ended.
  bool wait_for_one() {
    const int64_t begun = now_ns();
    const bool is_well = submit(1);
    counted().stall_ns += now_ns() - begun;
    collect();
    return is_well;
  }

  // Takes in all reads that have ended.
  void collect() {
    ReadDone done;
    bool is_pushed = false;
    while (reads_->pop(done)) {
      const unsigned buffer = (unsigned)done.tag;
      UnderWay& own = under_way_[buffer];
      const int64_t before = from_.before(own.row);
      if (done.result >= 0) counts_[own.layer].bytes += done.result;
      const bool is_whole = done.result >= before + from_.row_bytes;
      const bool is_passing = done.result >= 0 || done.result == -EINTR || done.result == -EAGAIN;
      if (!is_whole && is_passing && own.tries < MOST_TRIES) {
        own.tries++;
        push(buffer);
        is_pushed = true;
        continue;
      }
      end(own, buffers_ + buffer * buffer_bytes_ + before, is_whole, done.result);
      free_.push_back(buffer);
    }
    is_pushed |= !free_.empty() && !waiting_.empty();
    push_waiting();
    if (is_pushed) submit();
  }
  void end(const UnderWay& own, const uint8_t* bytes, bool is_whole, int result) {
    uint8_t& state = states_[own.slot];
    if (is_whole) {
      std::memcpy(memory_ + own.slot * from_.row_bytes, bytes, from_.row_bytes);
      wanted_under_way_ -= state == WANTED;
      hinted_under_way_ -= state == HINTED;
      state = state == HINTED ? PREFETCHED : READY;
    } else {
      fail(own.slot, result < 0 ? -result : 0);
    }
    slots_.unpin(own.slot);
  }
  // The slot has no row; who asks again reads again.
  void fail(int32_t slot, int error) {
    wanted_under_way_ -= states_[slot] == WANTED;
    hinted_under_way_ -= states_[slot] == HINTED;
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
  std::unique_ptr<Reads> reads_;
  const int64_t buffer_bytes_;
  uint8_t* const buffers_;
  std::vector<UnderWay> under_way_;  // by buffer
  std::vector<unsigned> free_;       // buffers
  std::deque<UnderWay> waiting_;     // for a buffer
  int64_t stamp_ = 0, wanted_under_way_ = 0, hinted_under_way_ = 0;
  int pushed_ = 0;  // and not handed on yet
  int broken_ = 0;  // the errno after which nothing is read any more
  int64_t layer_ = 0;               // whose lookup it is
  std::vector<DiskCounts> counts_;  // by layer
};

}  // namespace memplus
