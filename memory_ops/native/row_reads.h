// Reads of rows of a file: so many are under way at once, the others wait for a buffer.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "row_file.h"

namespace memplus {

constexpr int MOST_TRIES = 3;  // of a read that ends too early
constexpr int PUSHED_TOGETHER = 16;  // the disk begins while the next rows are looked for
constexpr auto PATIENCE = std::chrono::milliseconds(500);  // of who waits, until it says so

struct RowRead {
  int64_t row;
  int32_t slot;
  int64_t layer;      // for whose lookup
  int64_t bytes = 0;  // that came, of all tries
  int tries = 1;
};

class RowReadsOwner {
 public:
  // Is told with the lock: the row's bytes; or none and an errno, 0 where the file ends before it.
  virtual void read_ended(const RowRead& read, const uint8_t* bytes, int error) = 0;

 protected:
  ~RowReadsOwner() = default;
};

// One thread calls it, all but `lock` with the lock. It may add reads, go away and compute: where
// many wait for a buffer, a thread of their own begins them as others end.
class RowReads {
 public:
  using Lock = std::unique_lock<std::mutex>;

  RowReads(RowFile from, unsigned depth, std::unique_ptr<Reads> reads, RowReadsOwner& owner)
      : from_(from),
        owner_(owner),
        reads_(std::move(reads)),
        buffer_bytes_(from.span_bytes()),
        buffers_((uint8_t*)std::aligned_alloc(4096, depth * buffer_bytes_)),
        under_way_(depth) {
    for (unsigned i = 0; i < depth; i++) free_.push_back(depth - 1 - i);
  }
  RowReads(const RowReads&) = delete;
  ~RowReads() {
    Lock own = lock();
    waiting_.clear();
    while (is_feeding_) came_.wait(own);
    is_ending_ = true;
    added_.notify_one();
    own.unlock();
    if (feeder_.joinable()) feeder_.join();
    own.lock();
    // the kernel writes into the buffers until then; should it never say so, they are left to it
    while (num_under_way() && wait(own)) {
    }
    if (num_under_way()) {
      (void)reads_.release();
      return;
    }
    reads_.reset();
    std::free(buffers_);
  }

  bool has_buffers() const { return buffers_; }
  Lock lock() { return Lock(mutex_); }

  // Whether a few more find buffers, and leave some to others.
  bool has_room() const { return free_.size() > under_way_.size() / 4; }
  // The errno after which nothing is read any more.
  int error() const { return broken_; }
  // Of all reads so far.
  int64_t num_ended() const { return num_ended_; }

  void add(const RowRead& read) {
    waiting_.push_back(read);
    if (!is_feeding_) push_waiting();
  }
  // Begins what was added. A few that wait for a buffer are left to whoever waits for them.
  void begin() {
    if (is_feeding_) return;
    submit();
    if (waiting_.size() > under_way_.size() / 4) feed();
  }
  // Tells the owner of all reads that have ended.
  void collect() {
    if (is_feeding_) return;
    take_in();
    if (pushed_) submit();
  }
  // Waits until some have ended; with others under way in a thread of their own, at most for
  // PATIENCE. False once the kernel takes nothing more.
  bool wait(Lock& lock) {
    if (is_feeding_) {
      is_awaited_ = true;
      came_.wait_for(lock, PATIENCE);
      is_awaited_ = false;
      return true;
    }
    const bool is_well = submit(1);
    collect();
    return is_well;
  }

 private:
  size_t num_under_way() const { return under_way_.size() - free_.size(); }

  void push_waiting() {
    while (!free_.empty() && !waiting_.empty()) {
      const unsigned buffer = free_.back();
      free_.pop_back();
      under_way_[buffer] = waiting_.front();
      waiting_.pop_front();
      push(buffer);
    }
  }
  void push(unsigned buffer) {
    uint8_t* const memory = buffers_ + buffer * buffer_bytes_;
    reads_->push(from_.read_of(under_way_[buffer].row, memory, buffer));
    if (++pushed_ == PUSHED_TOGETHER && !is_feeding_) submit();
  }

  // Hands on what was pushed, and waits until so many have ended.
  bool submit(unsigned wanted = 0) {
    pushed_ = 0;
    if (!broken_) broken_ = reads_->submit(wanted);
    return !broken_;
  }

  void take_in() {
    ReadDone done;
    while (reads_->pop(done)) {
      const unsigned buffer = (unsigned)done.tag;
      RowRead& own = under_way_[buffer];
      const int64_t before = from_.before(own.row);
      own.bytes += std::max(done.result, 0);
      const bool is_whole = done.result >= before + from_.row_bytes;
      const bool is_passing = done.result >= 0 || done.result == -EINTR || done.result == -EAGAIN;
      if (!is_whole && is_passing && own.tries < MOST_TRIES) {
        own.tries++;
        push(buffer);
        continue;
      }
      const uint8_t* const bytes = buffers_ + buffer * buffer_bytes_ + before;
      owner_.read_ended(own, is_whole ? bytes : nullptr, std::max(-done.result, 0));
      free_.push_back(buffer);
      num_ended_++;
    }
    push_waiting();
  }

  // Has the feeder go on until none waits; till then the reads are its own.
  void feed() {
    try {
      if (!feeder_.joinable()) feeder_ = std::thread([this] { run_feeder(); });
    } catch (const std::system_error&) {
      return;  // there is no thread to be had: reads begin when somebody waits
    }
    is_feeding_ = true;
    added_.notify_one();
  }
  void run_feeder() {
    Lock own = lock();
    for (;;) {
      added_.wait(own, [this] { return is_feeding_ || is_ending_; });
      if (is_ending_) return;
      const unsigned together = std::min<unsigned>(PUSHED_TOGETHER, under_way_.size());
      while (!waiting_.empty() && !broken_) {
        pushed_ = 0;
        own.unlock();
        // while some wait for a buffer, all are under way: so many will end
        const int error = reads_->submit(together);
        own.lock();
        broken_ = error;
        take_in();
        if (is_awaited_) came_.notify_one();
      }
      submit();
      is_feeding_ = false;
      came_.notify_one();
    }
  }

  const RowFile from_;
  RowReadsOwner& owner_;
  std::unique_ptr<Reads> reads_;
  const int64_t buffer_bytes_;
  uint8_t* const buffers_;
  std::vector<RowRead> under_way_;  // by buffer
  std::vector<unsigned> free_;      // buffers
  std::deque<RowRead> waiting_;     // for a buffer
  int pushed_ = 0;                  // and not handed on yet
  int broken_ = 0;
  int64_t num_ended_ = 0;

  std::mutex mutex_;
  std::condition_variable added_, came_;
  bool is_feeding_ = false, is_awaited_ = false, is_ending_ = false;
  std::thread feeder_;
};

}  // namespace memplus
