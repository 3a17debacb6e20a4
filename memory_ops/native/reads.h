// Concurrent reads of a file: through io_uring, through threads, or with injected faults.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "read_ring.h"

namespace memplus {

struct Read {
  int64_t offset;
  void* buffer;
  unsigned size;
  uint64_t tag;
};

struct ReadDone {
  uint64_t tag;
  int result;  // bytes, or -errno
};

// `submit` starts the pushed reads, which complete in any order. One thread calls all functions.
class Reads {
 public:
  virtual ~Reads() = default;
  virtual void push(const Read& read) = 0;
  // Waits until `wanted` reads in flight have completed. Returns 0 or an errno.
  virtual int submit(unsigned wanted) = 0;
  virtual bool pop(ReadDone& done) = 0;
  // After a failed submit: removes a read that has not started. False if there is none.
  virtual bool take_back(uint64_t& tag) = 0;
};

class RingReads : public Reads {
 public:
  RingReads(int file, unsigned depth) : file_(file), ring_(depth) {}
  bool is_open() const { return ring_.is_open(); }
  int error() const { return ring_.error(); }
  void push(const Read& read) override {
    ring_.push(file_, read.offset, read.buffer, read.size, read.tag);
  }
  int submit(unsigned wanted) override { return ring_.submit(wanted); }
  bool pop(ReadDone& done) override { return ring_.pop(done.tag, done.result); }
  bool take_back(uint64_t& tag) override { return ring_.take_back(tag); }

 private:
  int file_;
  ReadRing ring_;
};

// Blocking reads in threads, for kernels without io_uring.
class ThreadReads : public Reads {
 public:
  ThreadReads(int file, unsigned threads) : file_(file) {
    try {
      for (unsigned i = 0; i < threads; i++) threads_.emplace_back([this] { run(); });
    } catch (...) {
      end();
      throw;
    }
  }
  ~ThreadReads() override { end(); }
  void push(const Read& read) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      waiting_.push_back(read);
    }
    wake_.notify_one();
  }
  int submit(unsigned wanted) override {
    std::unique_lock<std::mutex> lock(mutex_);
    ended_.wait(lock, [&] { return done_.size() >= wanted; });
    return 0;
  }
  bool pop(ReadDone& done) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (done_.empty()) return false;
    done = done_.front();
    done_.pop_front();
    return true;
  }
  bool take_back(uint64_t&) override { return false; }

 private:
  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_ending_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return is_ending_ || !waiting_.empty(); });
      if (is_ending_) return;
      const Read read = waiting_.front();
      waiting_.pop_front();
      lock.unlock();
      const ssize_t result = pread(file_, read.buffer, read.size, (off_t)read.offset);
      const ReadDone done = {read.tag, result < 0 ? -errno : (int)result};
      lock.lock();
      done_.push_back(done);
      ended_.notify_one();
    }
  }

  int file_;
  bool is_ending_ = false;
  std::mutex mutex_;
  std::condition_variable wake_, ended_;
  std::deque<Read> waiting_;
  std::deque<ReadDone> done_;
  std::vector<std::thread> threads_;
};

// Faults for tests. Each `every`-th read (0: none) ends with `result`, -errno or too few bytes. The
// first `submits` submits fail with `submit_error`.
struct ReadFault {
  int64_t every, result, submits, submit_error;
};

class FaultyReads : public Reads {
 public:
  FaultyReads(std::unique_ptr<Reads> reads, ReadFault fault)
      : reads_(std::move(reads)), fault_(fault) {}
  void push(const Read& read) override { reads_->push(read); }
  int submit(unsigned wanted) override {
    if (fault_.submits) {
      fault_.submits--;
      return (int)fault_.submit_error;
    }
    return reads_->submit(wanted);
  }
  bool pop(ReadDone& done) override {
    if (!reads_->pop(done)) return false;
    if (fault_.every && ++count_ % fault_.every == 0) done.result = (int)fault_.result;
    return true;
  }
  bool take_back(uint64_t& tag) override { return reads_->take_back(tag); }

 private:
  std::unique_ptr<Reads> reads_;
  ReadFault fault_;
  int64_t count_ = 0;
};

}  // namespace memplus
