// The threads that a process keeps for its exchanges with others.
#include "fabric/work/crew.h"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <latch>
#include <memory>
#include <set>
#include <thread>

#include "check.h"
#include "threads.h"

namespace jax_ep {
namespace {

// Each task waits for all others to run.
EP_TEST(TasksThatBlockKeepNoneWaiting) {
  Crew crew;
  for (const std::ptrdiff_t count : {1, 5, 20, 7}) {
    std::latch all_run(count);
    std::latch ended(count);
    for (std::ptrdiff_t i = 0; i < count; ++i) {
      crew.Schedule([&] {
        all_run.arrive_and_wait();
        ended.count_down();
      });
    }
    ended.wait();
  }
}

EP_TEST(TasksMayComeFromManyThreads) {
  constexpr int kThreads = 6;
  constexpr int kTasks = 300;
  std::atomic<int> num_run{0};
  {
    Crew crew;
    OnThreads(kThreads, [&](std::int64_t) {
      for (int i = 0; i < kTasks; ++i) crew.Schedule([&] { ++num_run; });
    });
  }
  EP_CHECK_EQ(num_run.load(), kThreads * kTasks);
}

EP_TEST(TasksMayScheduleTasks) {
  Crew crew;
  std::latch ended(1);
  crew.Schedule([&] {
    std::latch inner_ended(1);
    crew.Schedule([&] { inner_ended.count_down(); });
    inner_ended.wait();
    ended.count_down();
  });
  ended.wait();
}

EP_TEST(EndWaitsForTasks) {
  std::atomic<int> num_ended{0};
  {
    Crew crew;
    for (int i = 0; i < 8; ++i) {
      crew.Schedule([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(30));
        ++num_ended;
      });
    }
  }
  EP_CHECK_EQ(num_ended.load(), 8);
}

// One task after the other takes no thread each.
EP_TEST(ThreadsAreUsedAgain) {
  Crew crew;
  std::set<std::thread::id> threads;
  for (int i = 0; i < 200; ++i) {
    std::latch ended(1);
    crew.Schedule([&] {
      threads.insert(std::this_thread::get_id());
      ended.count_down();
    });
    ended.wait();
    // Lets the thread get back.
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  EP_CHECK(threads.size() < 100);
}

// What a task holds is let go as soon as it has ended.
EP_TEST(TasksAreNotKept) {
  Crew crew;
  const auto held = std::make_shared<int>(1);
  crew.Schedule([held] {});
  const auto start = std::chrono::steady_clock::now();
  while (held.use_count() > 1 &&
         std::chrono::steady_clock::now() - start < std::chrono::seconds(20)) {
    std::this_thread::yield();
  }
  EP_CHECK_EQ(held.use_count(), 1);
}

}  // namespace
}  // namespace jax_ep
