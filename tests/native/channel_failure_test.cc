// Whole jobs that lose a rank, a process or a channel: all others are told.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <latch>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "fabric/processes/process_words.h"
#include "played_process.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

// A rank does not come: its process's others fail, and then everybody.
EP_TEST(ProcessWhoseOwnRankIsMissingFailsForAll) {
  for (const std::int32_t lame : {0, 1}) {
    const Case which("missing in process " + Show(lame));
    SimulatedJob job(2);
    job.AddGroup({0, 0, 1, 1});
    OnThreads(4, [&](std::int64_t rank) {
      job.Works({.rank = static_cast<std::int32_t>(rank)});
    });
    job.SetTimeout(lame, kShort);
    const auto start = Clock::now();
    OnThreads(4, [&](std::int64_t thread) {
      const SpanCall call = {.rank = static_cast<std::int32_t>(thread), .turn = 1};
      const std::int32_t missing = 2 * lame;
      if (call.rank == missing) return;
      const SpanOutcome outcome = job.Attend(call).Wait();
      if (call.rank == missing + 1) {
        CheckFailed(outcome, {"rank " + Show(missing + 1) + " waited 0.2 s for rank " +
                              Show(missing) + " to come"});
      } else {
        CheckFailed(outcome, {"of process " + Show(lame) + " had given up"});
      }
    });
    // The late rank fails as well, and so do all ranks from now on.
    OnThreads(4, [&](std::int64_t rank) {
      const SpanCall call = {
          .run_id = 2, .rank = static_cast<std::int32_t>(rank), .turn = 2};
      CheckFailed(job.Attend(call).Wait(), {"dispatch: rank " + Show(rank) + " of 4"});
    });
    EP_CHECK(Clock::now() - start < kAtOnce);
  }
}

// What fails in one group leaves the others alone.
EP_TEST(OtherGroupsGoOn) {
  SimulatedJob job(2);
  job.AddGroup({0, 1});
  job.AddGroup({0, 1});
  job.SetTimeout(0, kShort);
  CheckFailed(job.Attend({.group = 0, .rank = 0}).Wait(), {"had not published"});
  job.SetTimeout(0, kLong);
  OnThreads(2, [&](std::int64_t rank) {
    SpanCall call = {.group = 1, .rank = static_cast<std::int32_t>(rank)};
    for (call.turn = 0; call.turn < 5; ++call.turn) job.Works(call);
  });
  // What the one that gave up had published is good for the one that comes late.
  job.Works({.group = 0, .rank = 1});
  CheckFailed(job.Attend({.group = 0, .rank = 1, .turn = 1}).Wait(),
              {"rank 0 of process 0 had given up, in epoch 1"});
}

EP_TEST(ChannelMayEndWhileOthersWait) {
  SimulatedJob job(2);
  job.AddGroup({0, 1});
  OnThreads(2, [&](std::int64_t rank) {
    job.Works({.rank = static_cast<std::int32_t>(rank)});
  });
  const PendingSpanCall ending = job.Attend({.rank = 1, .turn = 1});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EP_CHECK(!ending.HasEnded());
  job.End(1);
  CheckFailed(ending.Wait(), {"the channel ends"});
  CheckFailed(job.Attend({.rank = 0, .turn = 1}).Wait(),
              {"rank 1 of process 1 had given up, in epoch 2"});
}

// A process that stops for ever when it enters a phase.
class Stop {
 public:
  Stop(std::int32_t process, Phase phase, Epoch epoch)
      : process_(process), phase_(phase), epoch_(epoch) {}

  void OnPhase(std::int32_t process, Phase phase, Epoch epoch) {
    if (process != process_ || phase != phase_ || epoch != epoch_) return;
    stopped_ = true;
    stopped_.notify_all();
    released_.wait(false);
  }
  void Await() const { stopped_.wait(false); }
  void Release() {
    released_ = true;
    released_.notify_all();
  }

 private:
  const std::int32_t process_;
  const Phase phase_;
  const Epoch epoch_;
  std::atomic<bool> stopped_{false};
  std::atomic<bool> released_{false};
};

const std::vector<std::int32_t> kThreeProcesses = {0, 1, 1, 2};
constexpr Epoch kStopEpoch = 4;

// Exchanges turn after turn until one fails; returns what came of that. Others may
// complete the epoch that a process stops in, and the next, which it had published.
SpanOutcome ExchangeUntilFailure(SimulatedJob& job, std::int64_t rank) {
  SpanCall call = {.rank = static_cast<std::int32_t>(rank)};
  for (;; ++call.turn) {
    call.bytes = {(call.turn * 71) % 300, call.turn % 3 == 0 ? 0 : 40};
    SpanOutcome outcome = job.Attend(call).Wait();
    if (outcome.failure || !CheckWorked(call, 4, outcome)) return outcome;
    const bool could_work = call.turn < static_cast<std::int64_t>(kStopEpoch) + 1;
    EP_CHECK(could_work);
    if (!could_work) return outcome;
  }
}

// Three processes, of 1, 2 and 1 ranks, exchange until process `victim` stops.
void CheckStop(std::int32_t victim, Phase phase, const std::string& doing, bool dies) {
  const Case which("process " + Show(victim) + " " + doing +
                   (dies ? " dies" : " stops"));
  Stop stop(victim, phase, kStopEpoch);
  SimulatedJob job(3, [&](std::int32_t process, Phase entered, Epoch epoch) {
    stop.OnPhase(process, entered, epoch);
  });
  job.AddGroup(kThreeProcesses);
  for (const std::int32_t process : {0, 1, 2}) {
    if (process != victim) job.SetTimeout(process, dies ? kLong : kShort);
  }
  const std::string its_ranks =
      victim == 1 ? "ranks 1, 2" : "rank " + Show(victim == 0 ? 0 : 3);
  std::latch survivors(4 - std::ranges::count(kThreeProcesses, victim));
  const auto start = Clock::now();
  OnThreads(5, [&](std::int64_t thread) {
    if (thread == 4) {
      stop.Await();
      if (dies) job.shown(0, victim).alive.store(false, std::memory_order_relaxed);
      survivors.wait();
      return stop.Release();
    }
    const SpanOutcome outcome = ExchangeUntilFailure(job, thread);
    if (kThreeProcesses[static_cast<std::size_t>(thread)] == victim) return;
    CheckFailed(outcome, {"dispatch: rank " + Show(thread) + " of 4 gave up, because",
                          its_ranks + " of process " + Show(victim),
                          doing + ", in epoch " + Show(kStopEpoch)});
    if (dies) CheckFailed(outcome, {"had ended"});
    survivors.count_down();
  });
  EP_CHECK(Clock::now() - start < kAtOnce);
}

void CheckStopsAt(std::int32_t victim, bool dies) {
  constexpr std::pair<Phase, const char*> kPhases[] = {
      {Phase::kFollowing, "waiting to be told what comes next"},
      {Phase::kMeeting, "waiting for its own ranks"},
      {Phase::kReusing, "waiting for its window to be read"},
      {Phase::kPublishing, "publishing"},
      {Phase::kAwaiting, "waiting for the others to publish"},
      {Phase::kPulling, "pulling"},
      {Phase::kIdle, "between exchanges"}};
  for (const auto& [phase, doing] : kPhases) {
    const bool leads = victim == 0;
    if (leads && (phase == Phase::kFollowing || phase == Phase::kMeeting)) continue;
    CheckStop(victim, phase, doing, dies);
  }
}

EP_TEST(OthersSurviveALeaderThatDies) { CheckStopsAt(0, true); }
EP_TEST(OthersSurviveALeaderThatStops) { CheckStopsAt(0, false); }
EP_TEST(OthersSurviveAFollowerThatDies) {
  CheckStopsAt(1, true);
  CheckStopsAt(2, true);
}
EP_TEST(OthersSurviveAFollowerThatStops) {
  CheckStopsAt(1, false);
  CheckStopsAt(2, false);
}

}  // namespace
}  // namespace jax_ep
