// On which cores threads run, and that they leave those that are taken.
#include "fabric/work/cores.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <chrono>
#include <cstdint>
#include <thread>

#include "check.h"
#include "threads.h"

namespace jax_ep {
namespace {

#if defined(__linux__)

cpu_set_t Allowed() {
  cpu_set_t allowed;
  EP_CHECK_EQ(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
  return allowed;
}

// Runs body() on a thread of its own that may use the first `count` of this one's
// cores.
template <typename Body>
void OnCores(int count, Body body) {
  cpu_set_t cores = Allowed();
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &cores) && count-- <= 0) CPU_CLR(core, &cores);
  }
  OnThreads(1, [&](std::int64_t) {
    EP_CHECK_EQ(sched_setaffinity(0, sizeof(cores), &cores), 0);
    body();
    const cpu_set_t after = Allowed();
    EP_CHECK(CPU_EQUAL(&after, &cores));
  });
}

EP_TEST(LeavesItsCoreForAnother) {
  if (const cpu_set_t allowed = Allowed(); CPU_COUNT(&allowed) < 2) return;
  OnCores(2, [] {
    // The other core may be busy, after which nobody moves for a while; and the system
    // may move the thread back.
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    bool moved = false;
    while (!moved && std::chrono::steady_clock::now() < give_up) {
      const int before = ThisCore();
      LeaveCore();
      moved = ThisCore() != before;
      if (!moved) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EP_CHECK(moved);
  });
}

EP_TEST(StaysWhereThereIsNoOtherCore) {
  OnCores(1, [] {
    const int before = ThisCore();
    LeaveCore();
    EP_CHECK_EQ(ThisCore(), before);
  });
}

#else

EP_TEST(KnowsNoCores) {
  EP_CHECK_EQ(ThisCore(), -1);
  LeaveCore();
}

#endif

}  // namespace
}  // namespace jax_ep
