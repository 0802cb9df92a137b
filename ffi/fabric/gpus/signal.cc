// Implements signal.h.

#include "fabric/gpus/signal.h"

#include <chrono>
#include <cstdint>
#include <mutex>

#include "fabric/processes/futex.h"

namespace jax_ep {
namespace {

// Waking a thread takes longer.
constexpr std::chrono::microseconds kSpin{30};

}  // namespace

void Signal::Set(std::uint32_t value) {
  value_.store(value, std::memory_order_release);
  {
    const std::scoped_lock lock(mutex_);  // those that have just looked sleep by now
  }
  changed_.notify_all();
}

std::uint32_t Signal::Await(std::chrono::steady_clock::time_point deadline) const {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point spin_until = Clock::now() + kSpin;
  std::uint32_t value = value_.load(std::memory_order_acquire);
  while (value == 0 && Clock::now() < spin_until) {
    Pause();
    value = value_.load(std::memory_order_acquire);
  }
  if (value != 0) return value;
  std::unique_lock lock(mutex_);
  changed_.wait_until(lock, deadline, [&] {
    value = value_.load(std::memory_order_acquire);
    return value != 0;
  });
  return value;
}

}  // namespace jax_ep
