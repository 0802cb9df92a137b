// Implements cores.h: by affinities on Linux, not at all elsewhere.

#include "fabric/work/cores.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>

namespace jax_ep {

#if defined(__linux__)

int ThisCore() { return sched_getcpu(); }

namespace {

using Clock = std::chrono::steady_clock;

// A move that takes longer than this found the other cores busy, and waited its turn
// there: to an idle one it takes a few 10 µs. Then nobody moves for a while, in which
// there are many exchanges to make up for what the move has cost.
constexpr std::chrono::microseconds kPromptly{500};
constexpr std::chrono::milliseconds kPause{50};

std::atomic<Clock::time_point> stay_until{Clock::time_point::min()};

}  // namespace

void LeaveCore() {
  const Clock::time_point begin = Clock::now();
  if (begin < stay_until.load(std::memory_order_relaxed)) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(static_cast<unsigned>(ThisCore()), &others);
  if (CPU_COUNT(&others) == 0) return;
  // The first call moves it, the second leaves it free to go where it was.
  if (sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(allowed), &allowed);
  const Clock::time_point end = Clock::now();
  if (end - begin > kPromptly) {
    stay_until.store(end + kPause, std::memory_order_relaxed);
  }
}

#else

int ThisCore() { return -1; }

void LeaveCore() {}

#endif

}  // namespace jax_ep
