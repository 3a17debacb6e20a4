// Growing pauses between retries of system calls that failed with transient errors.
#pragma once

#include <errno.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>

namespace memplus {

constexpr int64_t MOST_PAUSE_MS = 100;

// Whether the same call may succeed a little later.
inline bool is_transient(int error) {
  return error == EAGAIN || error == EBUSY || error == ENOMEM || error == EINTR;
}

// Pauses of 1, 2, 4, ... 100 ms, until their sum reaches a limit.
class Backoff {
 public:
  explicit Backoff(int64_t limit_ms) : limit_ms_(limit_ms) {}

  // Begins the next pause after a failure; failures during a pause share it. False once the limit
  // is reached.
  bool pause() {
    if (is_pausing()) return true;
    if (total_ms_ >= limit_ms_) return false;
    pause_ms_ = std::min(std::max<int64_t>(1, 2 * pause_ms_), MOST_PAUSE_MS);
    total_ms_ += pause_ms_;
    until_ = Clock::now() + std::chrono::milliseconds(pause_ms_);
    return true;
  }
  void reset() { pause_ms_ = total_ms_ = 0; }
  bool is_pausing() const { return total_ms_ && Clock::now() < until_; }
  // Sleeps until the pause is over.
  void sleep() const {
    if (total_ms_) std::this_thread::sleep_until(until_);
  }

 private:
  using Clock = std::chrono::steady_clock;

  const int64_t limit_ms_;
  int64_t pause_ms_ = 0, total_ms_ = 0;
  Clock::time_point until_;
};

}  // namespace memplus
