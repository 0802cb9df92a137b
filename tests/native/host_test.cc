// Processes that exchange over shared memory, and what becomes of them when one of them
// is killed or stopped meanwhile.

#include "fabric/processes/host.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "fabric/processes/process_words.h"
#include "forked_processes.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

using std::chrono::duration;

EP_TEST(ProcessesExchange) {
  constexpr std::int64_t kTurns = 60;
  for (const std::vector<std::int32_t>& process_of :
       {kOneEach, {0, 0, 1, 1}, {1, 0, 0, 0}}) {
    const Case which("ranks in processes " + Show(process_of));
    Child child(1, kLong, [&](Side& side) {
      return !side.MakeTurns(process_of, kTurns).failure;
    });
    Side own(0, kLong);
    child.Join(own, 0);
    EP_CHECK_EQ(own.host().here(), 0);
    EP_CHECK(own.host().IsAlive(1));
    EP_CHECK_EQ(own.MakeTurns(process_of, kTurns).failure.value_or(""), "");
    EP_CHECK(child.Ended());
  }
}

// Where all come to their exchanges in one order, by themselves.
EP_TEST(OrderedProcessesExchangeWithoutALeader) {
  constexpr std::int64_t kTurns = 60;
  for (const std::vector<std::int32_t>& process_of : {kOneEach, {0, 0, 1, 1}}) {
    const Case which("ranks in processes " + Show(process_of));
    Child child(
        1, kLong,
        [&](Side& side) { return !side.MakeTurns(process_of, kTurns).failure; }, true);
    Side own(0, kLong, true);
    std::atomic<std::int64_t> followed = 0;
    own.host().set_on_phase([&](Phase phase, Epoch) {
      if (phase == Phase::kFollowing) ++followed;
    });
    child.Join(own, 0);
    EP_CHECK_EQ(own.MakeTurns(process_of, kTurns).failure.value_or(""), "");
    EP_CHECK(child.Ended());
    EP_CHECK_EQ(followed.load(), 0);
  }
}

// Groups of the same processes, and those that count the ranks another way round; each
// process comes to them in its own order.
EP_TEST(GroupsHaveChannelsOfTheirOwn) {
  const auto make_all = [](Side& side, bool forwards) {
    std::vector<std::pair<std::vector<std::int32_t>, std::int32_t>> groups = {
        {kOneEach, 0}, {kOneEach, 1}, {{1, 0}, 0}, {{0, 1, 1}, 1}};
    if (!forwards) groups = {groups.rbegin(), groups.rend()};
    std::vector<int> worked(groups.size());
    OnThreads(static_cast<std::int64_t>(groups.size()), [&](std::int64_t thread) {
      const auto i = static_cast<std::size_t>(thread);
      const auto& [process_of, group] = groups[i];
      SpanCall call = {.run_id = static_cast<std::int64_t>(process_of.size()) +
                                 10 * std::int64_t{process_of[0]},
                       .group = group};
      for (call.turn = 0; call.turn < 20; ++call.turn) {
        if (!CheckWorked(call, process_of.size(), side.Make(call, process_of))) return;
      }
      worked[i] = 1;
    });
    return worked == std::vector<int>(groups.size(), 1);
  };
  Child child(1, kLong, [&](Side& side) { return make_all(side, false); });
  Side own(0, kLong);
  child.Join(own, 0);
  EP_CHECK(own.host().ChannelOf(kOneEach, 0) == own.host().ChannelOf(kOneEach, 0));
  EP_CHECK(own.host().ChannelOf(kOneEach, 0) != own.host().ChannelOf(kOneEach, 1));
  EP_CHECK(make_all(own, true));
  EP_CHECK(child.Ended());
}

// A process that gets SIGKILL as it enters a phase of its fourth exchange.
EP_TEST(KilledProcessIsNamedAtOnce) {
  for (const Phase phase : {Phase::kFollowing, Phase::kMeeting, Phase::kReusing,
                            Phase::kPublishing, Phase::kAwaiting, Phase::kPulling}) {
    const Case which("phase " + Show(static_cast<int>(phase)));
    Child child(1, kLong, [&](Side& side) {
      side.host().set_on_phase([phase](Phase entered, Epoch epoch) {
        if (entered == phase && epoch == 4) kill(getpid(), SIGKILL);
      });
      return side.MakeTurns(kOneEach, 100).failure.has_value();
    });
    Side own(0, kLong);
    child.Join(own, 0);
    const auto start = Clock::now();
    const SpanOutcome outcome = own.MakeTurns(kOneEach, 100);
    CheckFailed(outcome, {"dispatch: rank 0 of 2 gave up, because in epoch ",
                          "rank 1 of process 1 had ended, ", ", in epoch 4"});
    EP_CHECK(Clock::now() - start < 3 * kSoon);
    EP_CHECK(!child.Ended());
    // From now on at once, and other groups that need it fail, too.
    const auto next = Clock::now();
    CheckFailed(own.Make({.run_id = 2}, kOneEach), {"rank 1 of process 1 had ended"});
    CheckFailed(
        own.Make({.group = 1}, kOneEach),
        {"in epoch 1 process 0 was connecting and process 1 (pid ", "has ended"});
    EP_CHECK(Clock::now() - next < kSoon);
  }
}

// A process that dies while the other already waits for it.
EP_TEST(WaitEndsSoonAfterAKill) {
  Child child(1, kLong, [](Side& side) {
    side.MakeTurns(kOneEach, 3);
    for (;;) pause();
    return false;
  });
  Side own(0, kLong);
  child.Join(own, 0);
  EP_CHECK_EQ(own.MakeTurns(kOneEach, 3).failure.value_or(""), "");
  Clock::time_point killed;
  std::thread killer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    killed = Clock::now();
    child.Signal(SIGKILL);
  });
  const SpanOutcome outcome = own.Make({.turn = 3}, kOneEach);
  const Clock::time_point told = Clock::now();
  killer.join();
  CheckFailed(outcome,
              {"in epoch 4 process 0 was waiting for the others to publish and "
               "rank 1 of process 1 had ended, between exchanges, in epoch 3"});
  EP_CHECK(told > killed);
  EP_CHECK(told - killed < kSoon);
}

EP_TEST(StoppedProcessIsNamedAtTheTimeout) {
  constexpr duration<double> kTimeout{0.5};
  Child child(1, kLong, [](Side& side) {
    side.host().set_on_phase([](Phase entered, Epoch epoch) {
      if (entered != Phase::kPulling || epoch != 3) return;
      kill(getpid(), SIGSTOP);
      // Until all threads have stopped.
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    });
    return side.MakeTurns(kOneEach, 100).failure.has_value();
  });
  Side own(0, kTimeout);
  child.Join(own, 0);
  const auto start = Clock::now();
  CheckFailed(own.MakeTurns(kOneEach, 100),
              {"rank 1 of process 1 had not",
               " after 0.5 s; that process was last seen ", ", in epoch 3"});
  EP_CHECK(Clock::now() - start >= kTimeout);
  EP_CHECK(Clock::now() - start < kTimeout + 3 * kSoon);
  // When it goes on it is told that it is too late.
  child.Signal(SIGCONT);
  EP_CHECK(child.Ended());
}

}  // namespace
}  // namespace jax_ep
