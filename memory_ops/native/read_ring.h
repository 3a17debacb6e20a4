// Concurrent reads of a file with io_uring, through its system calls.
#pragma once

#include <errno.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace memplus {

// Push reads, submit them together, and pop them as they complete, in any order. Not thread-safe.
class ReadRing {
 public:
  explicit ReadRing(unsigned depth) {
    io_uring_params params = {};
    ring_ = (int)syscall(__NR_io_uring_setup, depth, &params);
    if (ring_ < 0) {
      error_ = errno;
      return;
    }
    // io_uring of older kernels does not support IORING_OP_READ
    if (!(params.features & IORING_FEAT_RW_CUR_POS)) {
      error_ = ENOSYS;
      close_all();
      return;
    }
    submit_bytes_ = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    done_bytes_ = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    entry_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    submit_ = map(submit_bytes_, IORING_OFF_SQ_RING);
    done_ = map(done_bytes_, IORING_OFF_CQ_RING);
    entries_ = (io_uring_sqe*)map(entry_bytes_, IORING_OFF_SQES);
    if (!submit_ || !done_ || !entries_) {
      error_ = ENOMEM;
      close_all();
      return;
    }
    submit_tail_ = (unsigned*)(submit_ + params.sq_off.tail);
    submit_mask_ = *(unsigned*)(submit_ + params.sq_off.ring_mask);
    submit_array_ = (unsigned*)(submit_ + params.sq_off.array);
    done_head_ = (unsigned*)(done_ + params.cq_off.head);
    done_tail_ = (unsigned*)(done_ + params.cq_off.tail);
    done_mask_ = *(unsigned*)(done_ + params.cq_off.ring_mask);
    results_ = (io_uring_cqe*)(done_ + params.cq_off.cqes);
  }
  ReadRing(const ReadRing&) = delete;
  ~ReadRing() { close_all(); }

  bool is_open() const { return ring_ >= 0; }
  // The errno if the ring is not open.
  int error() const { return error_; }

  // At most `depth` reads may be in flight.
  void push(int file, int64_t offset, void* buffer, unsigned size, uint64_t tag) {
    const unsigned tail = *submit_tail_, index = tail & submit_mask_;
    io_uring_sqe& entry = entries_[index];
    std::memset(&entry, 0, sizeof entry);
    entry.opcode = IORING_OP_READ;
    entry.fd = file;
    entry.off = (uint64_t)offset;
    entry.addr = (uint64_t)buffer;
    entry.len = size;
    entry.user_data = tag;
    submit_array_[index] = index;
    __atomic_store_n(submit_tail_, tail + 1, __ATOMIC_RELEASE);
    pushed_++;
  }

  // Submits the pushed reads and waits for `wanted` results. Returns 0 or an errno; after an error,
  // reads that the kernel did not accept stay pushed.
  int submit(unsigned wanted) {
    while (pushed_ || wanted) {
      const unsigned flags = wanted ? IORING_ENTER_GETEVENTS : 0;
      const long taken =
          syscall(__NR_io_uring_enter, ring_, pushed_, wanted, flags, nullptr, (size_t)0);
      if (taken < 0 && errno != EINTR) return errno;
      if (taken > 0) pushed_ -= (unsigned)taken;
      if (taken >= 0 && !pushed_) break;
    }
    return 0;
  }

  // Removes the last pushed read that the kernel has not accepted. False if there is none.
  bool take_back(uint64_t& tag) {
    if (!pushed_) return false;
    // safe, because the kernel reads the queue only inside io_uring_enter
    const unsigned tail = *submit_tail_ - 1;
    tag = entries_[tail & submit_mask_].user_data;
    __atomic_store_n(submit_tail_, tail, __ATOMIC_RELEASE);
    pushed_--;
    return true;
  }

  // Whether a read has completed; if so, its tag and the bytes read or -errno.
  bool pop(uint64_t& tag, int& result) {
    const unsigned head = *done_head_;
    if (head == __atomic_load_n(done_tail_, __ATOMIC_ACQUIRE)) return false;
    const io_uring_cqe& entry = results_[head & done_mask_];
    tag = entry.user_data;
    result = entry.res;
    __atomic_store_n(done_head_, head + 1, __ATOMIC_RELEASE);
    return true;
  }

 private:
  uint8_t* map(size_t bytes, int64_t what) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_,
                        (off_t)what);
    return memory == MAP_FAILED ? nullptr : (uint8_t*)memory;
  }
  void close_all() {
    if (submit_) munmap(submit_, submit_bytes_);
    if (done_) munmap(done_, done_bytes_);
    if (entries_) munmap(entries_, entry_bytes_);
    if (ring_ >= 0) close(ring_);
    submit_ = done_ = nullptr;
    entries_ = nullptr;
    ring_ = -1;
  }

  int ring_, error_ = 0;
  unsigned pushed_ = 0;
  size_t submit_bytes_ = 0, done_bytes_ = 0, entry_bytes_ = 0;
  uint8_t *submit_ = nullptr, *done_ = nullptr;
  io_uring_sqe* entries_ = nullptr;
  io_uring_cqe* results_ = nullptr;
  unsigned *submit_tail_ = nullptr, *submit_array_ = nullptr, *done_head_ = nullptr,
           *done_tail_ = nullptr;
  unsigned submit_mask_ = 0, done_mask_ = 0;
};

}  // namespace memplus
