// A team of threads that runs the kernels' parallel loops, and how they wait for each other.
//
// Waiting threads poll, since waking a sleeping thread takes as long as a small kernel. But if
// other processes want the cores, the scheduler charges the team for the time of its polls, and
// preempts it while it computes: next to one busy loop half of the speed is lost. OpenMP's number of
// polls is fixed, and suits one case or the other. This team polls until it finds that it waits for
// cores much of the time; then its waiting threads sleep for a while, before it tries again.
#pragma once

#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "clock.h"
#include "simd.h"

namespace memplus {

constexpr int FEW_POLLS = 40;          // less than a microsecond: made even in a rest
constexpr int POLLS_PER_READING = 64;  // of the clock
constexpr int64_t LONGEST_POLLING_NS = 2'000'000;  // covers the Python code between two kernels
// Next to a process that computes, a thread waits for its core half of the time; threads that often
// run briefly, such as those of the HTTP process, take it for a tenth of the time.
constexpr int64_t WINDOW_NS = 100'000'000, MUCH_WAITING_NS = 20'000'000;
constexpr int64_t LONGEST_SLICE_NS = 5'000'000;  // one preemption is not longer
constexpr int64_t UNKNOWN_SLICE_NS = 2'000'000;  // if the system does not say how long it was
// Rests without polling. One that begins within RESTS_APART times the last one's length is longer.
constexpr int64_t FIRST_REST_NS = 100'000'000, LONGEST_REST_NS = 2'000'000'000, RESTS_APART = 5;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long the current thread has waited for a core since it began, after waking up and whenever it
// was preempted. Linux says so in a file; the second of its numbers is the time in nanoseconds.
class RunDelay {
 public:
  RunDelay() : file_(open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC)) {}
  ~RunDelay() {
    if (file_ >= 0) close(file_);
  }
  RunDelay(const RunDelay&) = delete;
  RunDelay& operator=(const RunDelay&) = delete;

  // -1 if the system does not say
  int64_t read_ns() const {
    char text[64];
    const ssize_t size = file_ < 0 ? 0 : pread(file_, text, sizeof text - 1, 0);
    if (size <= 0) return -1;
    text[size] = 0;
    long long running, waiting;
    // a system that does not count says 0
    return sscanf(text, "%lld %lld", &running, &waiting) == 2 && running ? waiting : -1;
  }

 private:
  const int file_;
};

// Decides how long the threads of a team poll. If OMP_WAIT_POLICY is passive, they never poll for
// long, as OpenMP's threads.
class Polling {
 public:
  Polling() {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    if (policy && !strcasecmp(policy, "passive")) rests_until_ = INT64_MAX;
  }

  // Polls until `is_over()`; false if the thread should sleep instead.
  template <class Condition>
  bool poll(int64_t begun, Condition is_over) {
    if (was_preempted()) count_waiting(begun, slice_ns());
    if (begun < rests_until_.load(std::memory_order_relaxed)) return false;
    do {
      for (int i = 0; i < POLLS_PER_READING; i++) {
        if (is_over()) return true;
        pause_cpu();
      }
    } while (monotonic_ns() < begun + LONGEST_POLLING_NS);
    return false;
  }

 private:
  // Whether another thread took this thread's core since the last call.
  static bool was_preempted() {
    static thread_local int64_t seen = INT64_MAX;
    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    const bool is_preempted = usage.ru_nivcsw > seen;
    seen = usage.ru_nivcsw;
    return is_preempted;
  }

  // How long this thread waited for a core since the last call, in one preemption.
  static int64_t slice_ns() {
    static thread_local RunDelay delay;
    static thread_local int64_t seen = 0;
    const int64_t total = delay.read_ns(), slice = total - seen;
    if (total < 0) return UNKNOWN_SLICE_NS;
    seen = total;
    return std::min(slice, LONGEST_SLICE_NS);
  }

  // Begins a rest if the threads have waited long for their cores.
  void count_waiting(int64_t now, int64_t waited_ns) {
    if (now - window_begun_.load(std::memory_order_relaxed) > WINDOW_NS) {
      window_begun_.store(now, std::memory_order_relaxed);
      waited_ns_.store(0, std::memory_order_relaxed);
    }
    const int64_t before = waited_ns_.fetch_add(waited_ns, std::memory_order_relaxed);
    if (before + waited_ns < MUCH_WAITING_NS) return;
    waited_ns_.store(0, std::memory_order_relaxed);
    const int64_t rested_until = rests_until_.load(std::memory_order_relaxed);
    if (now < rested_until) return;
    const int64_t last = rest_ns_.load(std::memory_order_relaxed);
    const bool is_again = now - rested_until < RESTS_APART * last;
    const int64_t next = is_again ? std::min(2 * last, LONGEST_REST_NS) : FIRST_REST_NS;
    rest_ns_.store(next, std::memory_order_relaxed);
    rests_until_.store(now + next, std::memory_order_relaxed);
  }

  std::atomic<int64_t> window_begun_{0}, waited_ns_{0};
  std::atomic<int64_t> rests_until_{0}, rest_ns_{0};
};

// A number that one thread changes and others wait for.
class Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void set(uint32_t value) {
    value_.store(value);
    if (sleepers_.load()) call(FUTEX_WAKE_PRIVATE, INT_MAX);
  }
  // Returns the number once it is no longer `old`. Polls only if the last wait was short: torch's
  // threads need the cores while it runs its own operations.
  uint32_t wait_while(uint32_t old, Polling& polling) {
    const auto is_over = [&] { return value() != old; };
    for (int i = 0; i < FEW_POLLS; i++) {
      if (is_over()) return value();
      pause_cpu();
    }
    const int64_t begun = monotonic_ns();
    const bool is_short = !was_long_.load(std::memory_order_relaxed);
    if (!is_short || !polling.poll(begun, is_over)) {
      sleepers_++;
      while (value_.load() == old) call(FUTEX_WAIT_PRIVATE, old);
      sleepers_--;
      const bool is_long = monotonic_ns() - begun > LONGEST_POLLING_NS;
      was_long_.store(is_long, std::memory_order_relaxed);
    }
    return value();
  }

 private:
  void call(int operation, uint32_t argument) {
    syscall(SYS_futex, &value_, operation, argument, nullptr, nullptr, 0);
  }

  alignas(LINE) std::atomic<uint32_t> value_{0};
  alignas(LINE) std::atomic<int> sleepers_{0};
  std::atomic<bool> was_long_{false};
};

// Runs one parallel loop at a time; a thread that calls `run` meanwhile waits.
class Team {
 public:
  using Body = void (*)(void* context, int64_t thread, int64_t threads);
  static constexpr int64_t MOST_THREADS = 1 << 12;

  int64_t num_threads() const { return num_threads_.load(std::memory_order_relaxed); }
  void set_num_threads(int64_t count) {
    num_threads_.store(std::min(std::max<int64_t>(1, count), MOST_THREADS - 1));
  }

  // Calls the body on `threads` threads: the caller and workers. If the system refuses a new
  // thread, fewer threads run the body.
  void run(int64_t threads, Body body, void* context) {
    std::lock_guard<std::mutex> lock(mutex_);
    threads_ = made(threads);
    body_ = body, context_ = context;
    unfinished_.store(threads_ - 1, std::memory_order_relaxed);
    const uint32_t before = finished_.value();
    start_.set((start_.value() / MOST_THREADS + 1) * MOST_THREADS + (uint32_t)threads_);
    body(context, 0, threads_);
    if (threads_ > 1) finished_.wait_while(before, polling_);
  }

  // Waits until all threads of the running loop have called it.
  void barrier() {
    const uint32_t phase = phase_.value();
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.set(phase + 1);
    } else {
      phase_.wait_while(phase, polling_);
    }
  }

 private:
  int64_t made(int64_t threads) {
    try {
      for (; num_workers_ < threads - 1; num_workers_++) {
        const int64_t thread = num_workers_ + 1;
        const uint32_t seen = start_.value();
        // never joined: a process may end while they wait
        std::thread([this, thread, seen] { work(thread, seen); }).detach();
      }
    } catch (const std::system_error&) {
    }
    return std::min(threads, num_workers_ + 1);
  }

  void work(int64_t thread, uint32_t seen) {
    for (;;) {
      seen = start_.wait_while(seen, polling_);
      if (thread >= seen % MOST_THREADS) continue;  // this loop has fewer threads
      body_(context_, thread, threads_);
      if (unfinished_.fetch_sub(1) == 1) finished_.set(finished_.value() + 1);
    }
  }

  Polling polling_;
  Signal start_;     // the number of the loop, times MOST_THREADS, plus its threads
  Signal finished_;  // loops whose last worker is done
  Signal phase_;     // barriers passed
  alignas(LINE) std::atomic<int64_t> unfinished_{0};
  alignas(LINE) std::atomic<int64_t> arrived_{0};
  std::atomic<int64_t> num_threads_{1};
  std::mutex mutex_;
  int64_t num_workers_ = 0;
  // of the running loop
  int64_t threads_ = 1;
  Body body_ = nullptr;
  void* context_ = nullptr;
};

// The team of this library, or the one that `join_team` gave it.
inline Team*& team() {
  static Team own;
  static Team* current = &own;
  // a forked process has none of the workers
  static const int at_fork = pthread_atfork(nullptr, nullptr, [] {
    const int64_t count = own.num_threads();
    new (&own) Team;
    own.set_num_threads(count);
  });
  (void)at_fork;
  return current;
}

}  // namespace memplus
