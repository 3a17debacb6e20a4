// Callbacks through which native kernels fetch missing rows of a table.
#pragma once

#include <cstdint>

namespace memplus {

constexpr int64_t ALL_THERE = -1, STILL_READING = -2;
constexpr int64_t NOT_STARTED = INT64_MIN;
constexpr int64_t NO_ROOM = -1, OUTSIDE = -2;  // returned instead of an errno

// Functions that fetch rows for the lookups of one layer; see DiskRows.
struct RowFetcher {
  int64_t (*start)(void* own, const int64_t* rows, int64_t tokens, int64_t token_rows,
                   int32_t is_new, int64_t layer, int64_t* slots);
  int64_t (*finish)(void* own, const int64_t* slots, int64_t count, int64_t layer, int32_t* error);
  void (*release)(void* own, const int64_t* slots, int64_t count);
  void (*on_progress)();  // called after each part, and repeatedly during a slow part
  void* own;
  int64_t layer;
};

// A row that could not be read, with an errno, 0 (the file ends before it), NO_ROOM or OUTSIDE.
struct ReadFailure {
  int64_t memory = -1;  // index of the memory layer among those of the call; -1 without a failure
  int64_t row = 0, error = 0;
};

// One lookup, split into parts if its rows do not fit in memory at once. Not thread-safe.
class Fetch {
 public:
  static constexpr int64_t FAILED = -1;  // returned instead of the end of a part

  Fetch(const RowFetcher& fetcher, const int64_t* rows, int64_t tokens, int64_t token_rows,
        int64_t* slots)
      : fetcher_(fetcher), rows_(rows), tokens_(tokens), token_rows_(token_rows), slots_(slots) {}
  Fetch(const Fetch&) = delete;
  ~Fetch() { release(); }

  // Starts the next part: reads the missing rows of the tokens after the previous part.
  void start() {
    release();
    const int64_t at = last_ * token_rows_;
    first_ = last_;
    const int64_t found = fetcher_.start(fetcher_.own, rows_ + at, tokens_ - first_, token_rows_,
                                         is_new_, fetcher_.layer, slots_ + at);
    is_new_ = is_read_ = false;
    is_started_ = found != NOT_STARTED;
    outside_ = is_started_ && found < 0 ? at - 1 - found : -1;
    if (found > 0) last_ += found;
  }
  // Waits for the started part. False if one of its rows could not be read.
  bool finish(ReadFailure& failure) {
    int64_t end;
    while ((end = wait(failure)) == STILL_READING) fetcher_.on_progress();
    if (end == FAILED) return false;
    fetcher_.on_progress();
    return true;
  }
  // Waits for the next part and returns its end (the token after its last one) or FAILED. On
  // STILL_READING the caller reports progress and calls again. Starts the part if necessary.
  int64_t next(ReadFailure& failure) {
    if (is_started_ && (is_read_ || first_ == last_)) start();
    return wait(failure);
  }
  // The end of the started part: the token after its last one.
  int64_t last() const { return last_; }
  // The index of a row id outside the table, or -1.
  int64_t outside() const { return outside_; }
  // Leaves the slots pinned, because the fetcher is closed.
  void abandon() { first_ = last_; }

 private:
  int64_t wait(ReadFailure& failure) {
    if (!is_started_) start();
    if (!is_started_) return STILL_READING;
    const int64_t at = first_ * token_rows_, count = (last_ - first_) * token_rows_;
    if (outside_ >= 0) {
      failure.row = rows_[outside_], failure.error = OUTSIDE;
      return FAILED;
    }
    if (first_ == last_ && last_ < tokens_) {
      failure.row = rows_[at], failure.error = NO_ROOM;
      return FAILED;
    }
    int32_t error = 0;
    const int64_t found =
        fetcher_.finish(fetcher_.own, slots_ + at, count, fetcher_.layer, &error);
    if (found == STILL_READING) return STILL_READING;
    is_read_ = found == ALL_THERE;
    if (is_read_) return last_;
    failure.row = rows_[at + found], failure.error = error;
    return FAILED;
  }
  void release() {
    if (first_ < last_)
      fetcher_.release(fetcher_.own, slots_ + first_ * token_rows_,
                       (last_ - first_) * token_rows_);
  }

  const RowFetcher fetcher_;
  const int64_t* const rows_;
  const int64_t tokens_, token_rows_;
  int64_t* const slots_;
  int64_t first_ = 0, last_ = 0;  // tokens of the part
  int64_t outside_ = -1;
  bool is_new_ = true;      // no part was started yet
  bool is_started_ = true;  // whether the last `start` found its slots
  bool is_read_ = false;    // the part's rows are in their slots
};

}  // namespace memplus
