// Queue of row reads: a limited number is in flight, the others wait for a buffer.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "backoff.h"
#include "row_file.h"

namespace memplus {

constexpr int MOST_TRIES = 3;  // of a read that returns too few bytes
// of a read with a transient error: the number of pauses in 10 s
constexpr int MOST_TRANSIENT_TRIES = 106;
constexpr int PUSHED_TOGETHER = 16;  // small, so that the disk starts while lookups find more rows
constexpr auto PATIENCE = std::chrono::milliseconds(500);  // longest wait between progress reports

struct RowRead {
  int64_t row;
  int32_t slot;
  int64_t layer;      // of the lookup or hint
  int64_t bytes = 0;  // read so far, over all tries
  int tries = 1;        // that ended too early
  int transient_tries = 1;
};

class RowReadsOwner {
 public:
  // Called with the lock held. On failure `bytes` is null and `error` an errno (0: the file ends).
  virtual void read_ended(const RowRead& read, const uint8_t* bytes, int error) = 0;

 protected:
  ~RowReadsOwner() = default;
};

// One thread calls it and holds the lock, except to call `lock`. It may add reads and then compute:
// if many reads wait for a buffer, a feeder thread starts them as others complete.
//
// Submits and reads with transient errors (`is_transient`) are retried after growing pauses, up to
// `retry_ms` in total; only `wait` and the feeder sleep. If a submit still fails after that, or
// fails permanently, all reads that have not started fail with its errno. Reads added later are
// tried again.
class RowReads {
 public:
  using Lock = std::unique_lock<std::mutex>;

  RowReads(RowFile from, unsigned depth, int64_t retry_ms, std::unique_ptr<Reads> reads,
           RowReadsOwner& owner)
      : from_(from),
        owner_(owner),
        reads_(std::move(reads)),
        buffer_bytes_(from.span_bytes()),
        buffers_((uint8_t*)std::aligned_alloc(from.buffer_alignment(), depth * buffer_bytes_)),
        in_flight_(depth),
        backoff_(retry_ms) {
    for (unsigned i = 0; i < depth; i++) free_.push_back(depth - 1 - i);
  }
  RowReads(const RowReads&) = delete;
  ~RowReads() {
    Lock own = lock();
    waiting_.clear();
    while (is_feeding_) progress_.wait(own);
    is_ending_ = true;
    added_.notify_one();
    own.unlock();
    if (feeder_.joinable()) feeder_.join();
    own.lock();
    // the kernel may write into the buffers until then; if waiting fails, leak them
    while (num_in_flight() && wait(own)) {
    }
    if (num_in_flight()) {
      (void)reads_.release();
      return;
    }
    reads_.reset();
    std::free(buffers_);
  }

  bool has_buffers() const { return buffers_; }
  Lock lock() { return Lock(mutex_); }

  // Whether more than a quarter of the buffers is free.
  bool has_room() const { return free_.size() > in_flight_.size() / 4; }
  // The errno of the last submit that failed finally.
  int error() const { return error_; }
  // Completed reads and pauses so far: increases unless the disk hangs.
  int64_t num_events() const { return num_events_; }

  void add(const RowRead& read) {
    waiting_.push_back(read);
    if (!is_feeding_) push_waiting();
  }
  // Starts the added reads. If only a few wait for a buffer, `wait` starts them, not the feeder.
  void begin() {
    if (is_feeding_) return;
    submit();
    if (waiting_.size() > in_flight_.size() / 4) start_feeder();
  }
  // Reports all completed reads to the owner.
  void collect() {
    if (is_feeding_) return;
    process_completed();
    if (pushed_) submit();
  }
  // Waits until a read completes, or for a pause between retries; if the feeder runs, at most
  // PATIENCE. False if a submit failed finally.
  bool wait(Lock& lock) {
    if (is_feeding_) {
      is_awaited_ = true;
      progress_.wait_for(lock, PATIENCE);
      is_awaited_ = false;
      return true;
    }
    backoff_.sleep();
    const bool is_ok = submit(1);
    collect();
    return is_ok;
  }

 private:
  size_t num_in_flight() const { return in_flight_.size() - free_.size(); }

  void push_waiting() {
    while (!free_.empty() && !waiting_.empty()) {
      const unsigned buffer = free_.back();
      free_.pop_back();
      in_flight_[buffer] = waiting_.front();
      waiting_.pop_front();
      push(buffer);
    }
  }
  void push(unsigned buffer) {
    uint8_t* const memory = buffers_ + buffer * buffer_bytes_;
    reads_->push(from_.read_of(in_flight_[buffer].row, memory, buffer));
    if (++pushed_ >= PUSHED_TOGETHER && !is_feeding_) submit();
  }
  void push_delayed() {
    while (!delayed_.empty()) {
      const unsigned buffer = delayed_.back();
      delayed_.pop_back();
      push(buffer);
    }
  }

  // Submits the pushed reads and waits until `wanted` reads have completed; does nothing during a
  // pause. False if the submit failed finally.
  bool submit(unsigned wanted = 0) {
    if (backoff_.is_pausing()) return true;
    pushed_ = 0;
    push_delayed();
    return submitted(reads_->submit(std::min<size_t>(wanted, num_in_flight())));
  }
  bool submitted(int error) {
    if (!error) return true;
    if (is_transient(error) && pause()) return true;
    fail_all(error);
    return false;
  }
  bool pause() {
    num_events_ += !backoff_.is_pausing();
    return backoff_.pause();
  }
  // Fails all reads that have not started.
  void fail_all(int error) {
    error_ = error;
    uint64_t buffer;
    while (reads_->take_back(buffer)) end((unsigned)buffer, nullptr, error);
    for (const unsigned delayed : delayed_) end(delayed, nullptr, error);
    delayed_.clear();
    for (const RowRead& read : waiting_) owner_.read_ended(read, nullptr, error);
    waiting_.clear();
    num_events_++;
    backoff_.reset();
  }
  void end(unsigned buffer, const uint8_t* bytes, int error) {
    owner_.read_ended(in_flight_[buffer], bytes, error);
    free_.push_back(buffer);
    num_events_++;
  }

  void process_completed() {
    ReadDone done;
    int last_error = 0;  // of a transient failure after the last pause
    while (reads_->pop(done)) {
      const unsigned buffer = (unsigned)done.tag;
      RowRead& own = in_flight_[buffer];
      const int64_t before = from_.before(own.row);
      own.bytes += std::max(done.result, 0);
      const bool is_whole = done.result >= before + from_.row_bytes;
      if (!is_whole && done.result >= 0 && own.tries < MOST_TRIES) {
        own.tries++;
        push(buffer);
        continue;
      }
      const int error = std::max(-done.result, 0);
      if (is_transient(error) && own.transient_tries < MOST_TRANSIENT_TRIES && !last_error) {
        if (pause()) {
          own.transient_tries++;
          delayed_.push_back(buffer);
          continue;
        }
        last_error = error;
      }
      if (is_whole && !backoff_.is_pausing()) backoff_.reset();
      end(buffer, is_whole ? buffers_ + buffer * buffer_bytes_ + before : nullptr, error);
    }
    if (last_error) fail_all(last_error);
    push_waiting();
  }

  // Starts the feeder, which owns the reads until none waits for a buffer.
  void start_feeder() {
    try {
      if (!feeder_.joinable()) feeder_ = std::thread([this] { run_feeder(); });
    } catch (const std::system_error&) {
      return;  // without a feeder thread, `wait` starts the reads
    }
    is_feeding_ = true;
    added_.notify_one();
  }
  void run_feeder() {
    Lock own = lock();
    for (;;) {
      added_.wait(own, [this] { return is_feeding_ || is_ending_; });
      if (is_ending_) return;
      const unsigned together = std::min<unsigned>(PUSHED_TOGETHER, in_flight_.size());
      push_waiting();
      while (!waiting_.empty()) {
        if (backoff_.is_pausing()) {
          own.unlock();
          backoff_.sleep();
          own.lock();
        }
        pushed_ = 0;
        push_delayed();
        own.unlock();
        // if reads wait for a buffer, all buffers are in flight, so `together` reads will complete
        const int error = reads_->submit(together);
        own.lock();
        submitted(error);
        process_completed();
        if (is_awaited_) progress_.notify_one();
      }
      submit();
      is_feeding_ = false;
      progress_.notify_one();
    }
  }

  const RowFile from_;
  RowReadsOwner& owner_;
  std::unique_ptr<Reads> reads_;
  const int64_t buffer_bytes_;
  uint8_t* const buffers_;
  std::vector<RowRead> in_flight_;  // by buffer
  std::vector<unsigned> free_;      // buffers
  std::deque<RowRead> waiting_;     // for a buffer
  std::vector<unsigned> delayed_;   // buffers of reads to retry after a pause
  int pushed_ = 0;                  // since the last submit
  int error_ = 0;
  int64_t num_events_ = 0;
  Backoff backoff_;

  std::mutex mutex_;
  std::condition_variable added_, progress_;
  bool is_feeding_ = false, is_awaited_ = false, is_ending_ = false;
  std::thread feeder_;
};

}  // namespace memplus
