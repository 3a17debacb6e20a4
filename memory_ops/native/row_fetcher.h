// Who brings a table's rows into memory where not all of them are there.
#pragma once

#include <cstdint>

namespace memplus {

constexpr int64_t ALL_THERE = -1, STILL_READING = -2;
constexpr int64_t NO_ROOM = -1, OUTSIDE = -2;  // in place of an errno

// Functions of the library that does it, for the lookups of one layer; see DiskRows.
struct RowFetcher {
  int64_t (*start)(void* own, const int64_t* rows, int64_t tokens, int64_t token_rows,
                   int32_t is_new, int64_t layer, int64_t* slots);
  int64_t (*finish)(void* own, const int64_t* slots, int64_t count, int64_t layer, int32_t* error);
  void (*release)(void* own, const int64_t* slots, int64_t count);
  void (*on_progress)();  // called after each part, and now and then while one takes long
  void* own;
  int64_t layer;
};

// A row that could not be read, and why: an errno, 0 where its file ends, NO_ROOM or OUTSIDE.
struct ReadFailure {
  int64_t memory = -1;  // of those that a call runs; below zero where all went well
  int64_t row = 0, error = 0;
};

// One lookup, part by part where there is no room for all of its rows. One thread's.
class Fetch {
 public:
  Fetch(const RowFetcher& fetcher, const int64_t* rows, int64_t tokens, int64_t token_rows,
        int64_t* slots)
      : fetcher_(fetcher), rows_(rows), tokens_(tokens), token_rows_(token_rows), slots_(slots) {}
  Fetch(const Fetch&) = delete;
  ~Fetch() { release(); }

  // Begins to read what is missing of the first tokens, or of those after the last part.
  void start() {
    release();
    const int64_t at = last_ * token_rows_;
    first_ = last_;
    const int64_t found = fetcher_.start(fetcher_.own, rows_ + at, tokens_ - first_, token_rows_,
                                         first_ == 0, fetcher_.layer, slots_ + at);
    outside_ = found < 0 ? at - 1 - found : -1;
    if (found > 0) last_ += found;
  }
  // Waits for the part's rows. False where one could not be read.
  bool finish(ReadFailure& failure) {
    const int64_t at = first_ * token_rows_, count = (last_ - first_) * token_rows_;
    if (outside_ >= 0) {
      failure.row = rows_[outside_], failure.error = OUTSIDE;
      return false;
    }
    if (!count) {
      failure.row = rows_[at], failure.error = NO_ROOM;
      return false;
    }
    int32_t error = 0;
    int64_t found;
    while ((found = fetcher_.finish(fetcher_.own, slots_ + at, count, fetcher_.layer, &error)) ==
           STILL_READING)
      fetcher_.on_progress();
    fetcher_.on_progress();
    if (found == ALL_THERE) return true;
    failure.row = rows_[at + found], failure.error = error;
    return false;
  }
  // The end of the part that is there.
  int64_t last() const { return last_; }

 private:
  void release() {
    if (first_ < last_)
      fetcher_.release(fetcher_.own, slots_ + first_ * token_rows_,
                       (last_ - first_) * token_rows_);
  }

  const RowFetcher& fetcher_;
  const int64_t* const rows_;
  const int64_t tokens_, token_rows_;
  int64_t* const slots_;
  int64_t first_ = 0, last_ = 0;
  int64_t outside_ = -1;  // the index of a row id that is none of the table's
};

}  // namespace memplus
