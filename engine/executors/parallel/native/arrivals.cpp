// How ranks wait for each other in shared memory; see shared_memory.py.
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace {

using Clock = std::chrono::steady_clock;

// one cache line for each rank, so that a rank's store does not slow the others' polls
constexpr int64_t WORDS = 8;
constexpr uint64_t LEFT = UINT64_MAX;

// Ranks arrive within microseconds of each other. After that, others may need the core.
constexpr auto SPIN = std::chrono::microseconds(50);
constexpr auto YIELD = std::chrono::milliseconds(1);

static_assert(std::atomic<uint64_t>::is_always_lock_free);

std::atomic<uint64_t>& arrived(uint64_t* lines, int64_t rank) {
  return *reinterpret_cast<std::atomic<uint64_t>*>(lines + WORDS * rank);
}

void pause(Clock::duration waited) {
  if (waited < SPIN) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else if (waited < YIELD) {
    sched_yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace

extern "C" {

// Says that `rank` has arrived at `round`, and waits for the others. What a rank wrote before, all
// see after it. Returns 1; 0 if the time is over (call it again); -1 if a rank has left.
int32_t memplus_arrive(uint64_t* lines, int64_t rank, int64_t size, uint64_t round,
                       int64_t limit_us) {
  arrived(lines, rank).store(round, std::memory_order_release);
  const auto begin = Clock::now();
  const auto limit = std::chrono::microseconds(limit_us);
  for (int64_t other = 0; other < size; ++other) {
    for (;;) {
      const uint64_t seen = arrived(lines, other).load(std::memory_order_acquire);
      if (seen == LEFT) return -1;
      if (seen >= round) break;
      const auto waited = Clock::now() - begin;
      if (waited > limit) return 0;
      pause(waited);
    }
  }
  return 1;
}

// Ends the waits of the others.
void memplus_leave(uint64_t* lines, int64_t rank) {
  arrived(lines, rank).store(LEFT, std::memory_order_release);
}

}  // extern "C"
