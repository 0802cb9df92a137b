// How work is shared where there are more cores than ranks, on any machine.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "fabric/threads/meeting.h"
#include "fabric/work/work_share.h"
#include "meeting_calls.h"
#include "threads.h"

// Takes the place of the standard library's in this program, so that what is done where
// there are more cores than ranks is tested on any machine.
unsigned int std::thread::hardware_concurrency() noexcept { return 8; }

namespace jax_ep {
namespace {

// Counts what it is given, and runs it there and then, or never.
struct CountedTasks {
  Schedule schedule(bool run) {
    return [this, run](const std::function<void()>& task) {
      ++count;
      if (run) task();
    };
  }
  std::int64_t count = 0;
};

// Returns how many tasks a meeting of `num_ranks` with so many chunks schedules when
// its helpers come at once.
std::int64_t TasksFor(std::int32_t num_ranks, std::int64_t chunks_per_rank) {
  MeetingPoint point;
  CountedTasks tasks;
  for (std::int32_t rank = 0; rank < num_ranks; ++rank) {
    const Call call = {
        .rank = rank, .num_ranks = num_ranks, .num_chunks = chunks_per_rank};
    const PendingCall pending(point, call, tasks.schedule(true));
    if (rank == num_ranks - 1) CheckWorked(call, pending.Wait());
  }
  return tasks.count;
}

// A task per helper, and one that tells all ranks but the last, as none has to wait.
EP_TEST(MeetingsScheduleNoMoreThanTheyNeed) {
  EP_CHECK_EQ(TasksFor(1, 100), 7);
  EP_CHECK_EQ(TasksFor(3, 100), 7 + 1);
  EP_CHECK_EQ(TasksFor(3, 1), 2 + 1);
  EP_CHECK_EQ(TasksFor(12, 100), 7 + 1);
  EP_CHECK_EQ(TasksFor(4, 0), 1);
}

void Repeat(MeetingPoint& point, Call call, std::int64_t turns,
            const Schedule& schedule) {
  std::mt19937_64 rng(static_cast<std::uint64_t>(call.rank));
  for (call.turn = 0; call.turn < turns; ++call.turn) {
    call.num_chunks = static_cast<std::int64_t>(rng() % 20);
    Dawdle(rng);
    CheckWorked(call, PendingCall(point, call, schedule).Wait());
  }
}

// Some helpers come when the exchange that they were meant for is long over.
EP_TEST(RanksMeetWithHelpersThatComeAtAnyTime) {
  for (const std::int32_t num_ranks : {1, 2, 5, 16}) {
    MeetingPoint point;
    HelperThreads helpers;
    OnThreads(num_ranks, [&](std::int64_t rank) {
      const Call call = {.rank = static_cast<std::int32_t>(rank),
                         .num_ranks = num_ranks};
      Repeat(point, call, 200, helpers.schedule());
    });
  }
}

// A full thread pool runs what it is given on the thread that gives it.
EP_TEST(HelpersMayRunWhereTheyAreScheduled) {
  MeetingPoint point;
  OnThreads(3, [&](std::int64_t rank) {
    const Call call = {.rank = static_cast<std::int32_t>(rank), .num_ranks = 3};
    Repeat(point, call, 100, AtOnce);
  });
}

// Work of which each chunk counts its runs.
Work CountingWork(std::vector<int>& runs) {
  const auto run = [](const void* args, std::int64_t chunk) {
    auto& counts = *static_cast<std::vector<int>*>(const_cast<void*>(args));
    ++counts[static_cast<std::size_t>(chunk)];
  };
  return {
      .args = &runs, .run = run, .num_chunks = static_cast<std::int64_t>(runs.size())};
}

EP_TEST(RunTogetherHelpsItselfWithAThreadPerCore) {
  std::vector<int> runs(100);
  HelperThreads helpers(7);
  for (int i = 1; i <= 300; ++i) {
    RunTogether({CountingWork(runs)}, helpers.schedule());
    EP_CHECK_EQ(runs, std::vector<int>(100, i));
  }
  EP_CHECK(helpers.num_scheduled() >= std::int64_t{7} * 300);
}

// A thread that misses its helpers makes way for them, and works on.
EP_TEST(RunTogetherDoesWithoutHelpersThatDoNotCome) {
  std::vector<int> runs(10000);
  CountedTasks tasks;
  RunTogether({CountingWork(runs)}, tasks.schedule(false));
  EP_CHECK_EQ(runs, std::vector<int>(runs.size(), 1));
  EP_CHECK_EQ(tasks.count, 7);
}

}  // namespace
}  // namespace jax_ep
