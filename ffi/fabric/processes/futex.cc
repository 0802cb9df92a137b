// Implements futex.h: by futexes on Linux, by looking again elsewhere.

#include "fabric/processes/futex.h"

#include <algorithm>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>
#else
#include <thread>
#endif

namespace jax_ep {

#if defined(__linux__)

// Not the private kind, which only threads of one process hear.
void Ring(Bell& bell) {
  bell.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void AwaitRing(const Bell& bell, std::uint32_t seen, std::chrono::nanoseconds longest) {
  if (longest.count() <= 0) return;
  constexpr std::int64_t kSecond = 1'000'000'000;
  const timespec time = {.tv_sec = longest.count() / kSecond,
                         .tv_nsec = longest.count() % kSecond};
  syscall(SYS_futex, &bell, FUTEX_WAIT, seen, &time, nullptr, 0);
}

#else

void Ring(Bell& bell) { bell.fetch_add(1, std::memory_order_release); }

// 50 µs is about what waking a thread takes, so little is lost by not being woken.
void AwaitRing(const Bell& bell, std::uint32_t seen, std::chrono::nanoseconds longest) {
  if (bell.load(std::memory_order_acquire) != seen) return;
  std::this_thread::sleep_for(
      std::min<std::chrono::nanoseconds>(longest, std::chrono::microseconds(50)));
}

#endif

}  // namespace jax_ep
