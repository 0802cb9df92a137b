#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <latch>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "fabric/processes/channel.h"
#include "fabric/processes/futex.h"
#include "fabric/processes/process_words.h"
#include "fabric/processes/shared_print.h"
#include "fabric/processes/window.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

using std::chrono::duration;

constexpr duration<double> kShort{0.2};
// A call that ends much sooner than this did not wait for it.
constexpr duration<double> kLong{60};
constexpr duration<double> kAtOnce{20};

constexpr const char* kDescribed =
    "dispatch of [64 rows, 256 bytes] with plan fingerprint 7";

// A process of one rank that the test plays: it does as much of the protocol as it is
// told to.
class PlayedProcess {
 public:
  explicit PlayedProcess(Shown& shown) : words_(shown.words), shown_(shown) {}

  void Enter(Phase phase, Epoch epoch) {
    words_.epoch.store(epoch, std::memory_order_relaxed);
    words_.phase.store(phase, std::memory_order_relaxed);
    Ring(words_.bell);
  }
  // Once: who has been told may be reading it.
  void Announce(Epoch epoch, const SpanCall& call) {
    if (words_.announced.load(std::memory_order_relaxed) == epoch) return;
    words_.names[epoch % 2] = {.site = call.site, .execution = call.run_id};
    words_.announced.store(epoch, std::memory_order_release);
    Ring(words_.bell);
  }
  void Publish(Epoch epoch, const SpanCall& call) {
    words_.prints[epoch % 2] = Share(call.print, call.bytes);
    const HalfLayout layout(call.bytes);
    char* half = shown_.NewHalf(epoch % 2, layout.BytesOf(1));
    for (std::size_t lent = 0; lent < call.bytes.size(); ++lent) {
      char* place = layout.Place(half, 0, lent);
      for (std::int64_t i = 0; i < call.bytes[lent]; ++i) {
        place[i] = PayloadByte(call, lent, i);
      }
    }
    words_.published.store(epoch, std::memory_order_release);
    Enter(Phase::kAwaiting, epoch);
  }
  void Finish(Epoch epoch) {
    words_.finished.store(epoch, std::memory_order_release);
    Enter(Phase::kIdle, epoch);
  }
  void GiveUp(Epoch epoch) {
    words_.gave_up.store(epoch, std::memory_order_release);
    Ring(words_.bell);
  }
  void Die() { shown_.alive.store(false, std::memory_order_relaxed); }

 private:
  ProcessWords& words_;
  Shown& shown_;
};

// Two processes of one rank each, of which the test plays one. Time-outs are long.
struct Duel {
  explicit Duel(std::int32_t played)
      : job(2, nullptr, played),
        group(job.AddGroup({0, 1})),
        peer(job.shown(group, played)),
        own({.rank = 1 - played}),
        theirs({.rank = played}) {
    job.SetTimeout(own.rank, kLong);
  }

  // Both carry out the exchange of one more epoch.
  void CheckExchange() {
    ++epoch;
    const PendingSpanCall pending = job.Attend(own);
    if (theirs.rank == 0) peer.Announce(epoch, theirs);
    peer.Publish(epoch, theirs);
    CheckWorked(own, 2, pending.Wait());
    peer.Finish(epoch);
    ++own.turn;
    ++theirs.turn;
  }

  // The process's calls fail now, and it says so to others.
  void CheckIsOver(const std::vector<std::string>& parts) {
    job.SetTimeout(own.rank, kLong);
    const auto start = Clock::now();
    ++own.turn;
    SpanCall other = own;
    other.site = 2;
    other.print.op = "combine";
    CheckFailed(job.Attend(own).Wait(), parts);
    std::vector<std::string> of_combine = parts;
    of_combine.emplace_back("combine: rank " + Show(own.rank) + " of 2 gave up");
    CheckFailed(job.Attend(other).Wait(), of_combine);
    EP_CHECK(Clock::now() - start < kAtOnce);
    EP_CHECK_EQ(job.shown(group, own.rank).words.gave_up.load(), epoch + 1);
  }

  SimulatedJob job;
  std::int32_t group;
  PlayedProcess peer;
  SpanCall own;
  SpanCall theirs;
  Epoch epoch = 0;  // of the last exchange
};

// The places of the protocol where a process waits for another, and how its own process
// gets there.
struct Wait {
  const char* what;
  std::int32_t played;
  Epoch num_before;                      // exchanges before it
  std::function<void(Duel&)> come_here;  // in the last one
  std::string doing;
  std::string missing;
};

const std::vector<Wait>& Waits() {
  static const std::vector<Wait> waits = {
      {"the leader's word", 0, 0, [](Duel&) {},
       "in epoch 1 process 1 was waiting to be told what comes next and rank 0 of "
       "process 0",
       "had not named the exchange"},
      {"the leader's next word", 0, 3, [](Duel&) {},
       "in epoch 4 process 1 was waiting to be told what comes next and rank 0 of "
       "process 0",
       "had not named the exchange"},
      {"its rows", 1, 0, [](Duel&) {},
       "in epoch 1 process 0 was waiting for the others to publish and rank 1 of "
       "process 1",
       "had not published"},
      {"the leader's rows", 0, 2,
       [](Duel& duel) { duel.peer.Announce(3, duel.theirs); },
       "in epoch 3 process 1 was waiting for the others to publish and rank 0 of "
       "process 0",
       "had not published"},
  };
  return waits;
}

// Runs body(wait, duel, pending) with the process waiting there.
void AtEachWait(
    const std::function<void(const Wait&, Duel&, const PendingSpanCall&)>& body,
    duration<double> timeout = kLong) {
  for (const Wait& wait : Waits()) {
    const Case which(std::string("waiting for ") + wait.what);
    Duel duel(wait.played);
    while (duel.epoch < wait.num_before) duel.CheckExchange();
    duel.job.SetTimeout(duel.own.rank, timeout);
    duel.peer.Enter(Phase::kPublishing, duel.epoch + 1);
    wait.come_here(duel);
    const PendingSpanCall pending = duel.job.Attend(duel.own);
    body(wait, duel, pending);
  }
}

EP_TEST(PeerThatStopsIsNamedAtTheTimeout) {
  AtEachWait(
      [](const Wait& wait, Duel& duel, const PendingSpanCall& pending) {
        const auto start = Clock::now();
        const std::vector<std::string> parts = {
            "dispatch: rank " + Show(duel.own.rank) + " of 2 gave up, because " +
                wait.doing + " " + wait.missing + " after 0.2 s",
            "last seen publishing, in epoch " + Show(duel.epoch + 1)};
        CheckFailed(pending.Wait(), parts);
        EP_CHECK(Clock::now() - start < kAtOnce);
        duel.CheckIsOver({wait.doing});
      },
      kShort);
}

EP_TEST(TimeoutIsNotCutShort) {
  Duel duel(1);
  duel.job.SetTimeout(0, kShort);
  const auto start = Clock::now();
  CheckFailed(duel.job.Attend(duel.own).Wait(), {"after 0.2 s"});
  EP_CHECK(Clock::now() - start >= kShort);
}

EP_TEST(PeerThatEndedIsNamedAtOnce) {
  AtEachWait([](const Wait& wait, Duel& duel, const PendingSpanCall& pending) {
    EP_CHECK(!pending.HasEnded());
    const auto start = Clock::now();
    duel.peer.Die();
    CheckFailed(pending.Wait(), {wait.doing + " had ended, publishing, in epoch " +
                                 Show(duel.epoch + 1)});
    EP_CHECK(Clock::now() - start < kAtOnce);
    duel.CheckIsOver({wait.doing});
  });
}

EP_TEST(PeerThatGaveUpIsNamedAtOnce) {
  AtEachWait([](const Wait& wait, Duel& duel, const PendingSpanCall& pending) {
    const auto start = Clock::now();
    duel.peer.GiveUp(duel.epoch + 1);
    CheckFailed(pending.Wait(), {wait.doing + " had given up, in epoch " +
                                 Show(duel.epoch + 1) + ", publishing"});
    EP_CHECK(Clock::now() - start < kAtOnce);
    duel.CheckIsOver({wait.doing});
  });
}

// Its rows are there: what comes after does not matter.
EP_TEST(PeerMayEndOnceItHasPublished) {
  AtEachWait([](const Wait&, Duel& duel, const PendingSpanCall& pending) {
    if (duel.theirs.rank == 0) duel.peer.Announce(duel.epoch + 1, duel.theirs);
    duel.peer.Publish(duel.epoch + 1, duel.theirs);
    duel.peer.GiveUp(duel.epoch + 1);
    duel.peer.Die();
    CheckWorked(duel.own, 2, pending.Wait());
  });
}

EP_TEST(LatePeerIsWaitedFor) {
  AtEachWait([](const Wait&, Duel& duel, const PendingSpanCall& pending) {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    EP_CHECK(!pending.HasEnded());
    if (duel.theirs.rank == 0) duel.peer.Announce(duel.epoch + 1, duel.theirs);
    duel.peer.Publish(duel.epoch + 1, duel.theirs);
    CheckWorked(duel.own, 2, pending.Wait());
  });
}

// Brings the process to where it has to fill the half of epoch 1 again, which the peer
// has not finished with.
PendingSpanCall AttendWithUnfinishedHalf(Duel& duel) {
  for (Epoch epoch = 1; epoch < 3; ++epoch) {
    const PendingSpanCall pending = duel.job.Attend(duel.own);
    duel.peer.Publish(epoch, duel.theirs);
    CheckWorked(duel.own, 2, pending.Wait());
    ++duel.own.turn;
    ++duel.theirs.turn;
  }
  duel.epoch = 2;
  duel.peer.Enter(Phase::kPulling, 1);
  const char* half = duel.job.shown(0, 0).halves[1].get();
  PendingSpanCall pending = duel.job.Attend(duel.own);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EP_CHECK(duel.job.shown(0, 0).halves[1].get() == half);
  EP_CHECK_EQ(duel.job.shown(0, 0).words.published.load(), 2);
  return pending;
}

const std::string kReusing =
    "in epoch 3 process 0 was waiting for its window to be read and rank 1 of process "
    "1 had ";

EP_TEST(HalfThatIsReadIsNotFilled) {
  Duel duel(1);
  duel.job.SetTimeout(0, duration<double>(0.4));
  CheckFailed(AttendWithUnfinishedHalf(duel).Wait(),
              {kReusing + "not finished with the one before the last after 0.4 s; that "
                          "process was last seen pulling, in epoch 1"});
  duel.CheckIsOver({kReusing});
}

EP_TEST(HalfIsFilledWhenItWasRead) {
  Duel duel(1);
  const PendingSpanCall pending = AttendWithUnfinishedHalf(duel);
  duel.peer.Finish(1);
  duel.peer.Publish(3, duel.theirs);
  CheckWorked(duel.own, 2, pending.Wait());
}

EP_TEST(ReaderThatEndedIsNamedAtOnce) {
  Duel duel(1);
  const PendingSpanCall pending = AttendWithUnfinishedHalf(duel);
  duel.peer.Die();
  CheckFailed(pending.Wait(), {kReusing + "ended, pulling, in epoch 1"});
  duel.CheckIsOver({kReusing});
}

EP_TEST(ReaderThatGaveUpIsNamedAtOnce) {
  Duel duel(1);
  const PendingSpanCall pending = AttendWithUnfinishedHalf(duel);
  duel.peer.GiveUp(1);
  CheckFailed(pending.Wait(), {kReusing + "given up, in epoch 1, pulling"});
  duel.CheckIsOver({kReusing});
}

EP_TEST(MemoryThatCannotBeHadIsReported) {
  Duel own(1);
  own.job.shown(0, 0).makes_halves = false;
  const std::string made =
      "in epoch 1 process 0 was publishing and could not make its window hold 320 "
      "bytes: ftruncate: No space left on device";
  CheckFailed(own.job.Attend(own.own).Wait(), {made});
  own.CheckIsOver({made});

  Duel others(1);
  others.job.shown(0, 1).shows_halves = false;
  others.peer.Publish(1, others.theirs);
  const std::string mapped =
      "in epoch 1 process 0 was waiting for the others to publish and could not map "
      "the window of rank 1 of process 1: mmap: Cannot allocate memory";
  CheckFailed(others.job.Attend(others.own).Wait(), {mapped});
  others.CheckIsOver({mapped});
}

// Two processes of two ranks that call different things, each for itself in accord.
void CheckMismatch(const CallPrint& print, const std::string& described) {
  SimulatedJob job(2);
  job.AddGroup({0, 1, 1, 0});
  const auto start = Clock::now();
  OnThreads(4, [&](std::int64_t thread) {
    SpanCall call = {.rank = static_cast<std::int32_t>(thread)};
    if (thread == 1 || thread == 2) call.print = print;
    const std::string they = "ranks 1, 2 of process 1 called " + described;
    const std::string we = std::string("ranks 0, 3 of process 0 called ") + kDescribed;
    const std::string own =
        ": rank " + Show(thread) + " of 4 gave up, because in epoch 1 ";
    const SpanOutcome outcome = job.Attend(call).Wait();
    // Who sees it first gives up; the other may see that instead.
    if (outcome.failure.value_or("").find("had given up") != std::string::npos) {
      CheckFailed(outcome, {own, "had given up, in epoch 1"});
    } else if (call.print == print) {
      CheckFailed(outcome, {own + they + " and " + we});
    } else {
      CheckFailed(outcome, {own + we + " and " + they});
    }
  });
  EP_CHECK(Clock::now() - start < kAtOnce);
}

EP_TEST(ProcessesThatCallDifferentThingsFail) {
  CheckMismatch({.op = "combine", .rows = 64, .row_bytes = 256, .plan = 7},
                "combine of [64 rows, 256 bytes] with plan fingerprint 7");
  CheckMismatch({.op = "dispatch", .rows = 65, .row_bytes = 256, .plan = 7},
                "dispatch of [65 rows, 256 bytes] with plan fingerprint 7");
  CheckMismatch({.op = "dispatch", .rows = 64, .row_bytes = 255, .plan = 7},
                "dispatch of [64 rows, 255 bytes] with plan fingerprint 7");
  CheckMismatch({.op = "dispatch", .rows = 64, .row_bytes = 256, .plan = 4000000000},
                "dispatch of [64 rows, 256 bytes] with plan fingerprint 4000000000");
}

// All that the error can tell of it is how much: the calls are the same by name.
void CheckOtherSizes(std::vector<std::int64_t> bytes, const std::string& sizes) {
  Duel duel(1);
  duel.theirs.bytes = std::move(bytes);
  duel.peer.Publish(1, duel.theirs);
  CheckFailed(duel.job.Attend(duel.own).Wait(),
              {"in epoch 1 rank 0 of process 0 called " + std::string(kDescribed) +
               " and rank 1 of process 1 called " + kDescribed + sizes});
  duel.CheckIsOver({sizes});
}

EP_TEST(ProcessesThatLendDifferentBuffersFail) {
  CheckOtherSizes({256, 128},
                  "; a rank publishes 320 bytes in the one and 384 bytes in the other");
  CheckOtherSizes({256, 64, 0},
                  "; a rank lends 2 buffers in the one and 3 in the other");
  CheckOtherSizes({}, "; a rank lends 2 buffers in the one and 0 in the other");
  CheckOtherSizes(
      {64, 256},
      "; a rank publishes 320 bytes in both, but not the same of each buffer");
}

// A name longer than what processes share of it is cut, not run over.
EP_TEST(LongNamesAreTold) {
  const std::string name(200, 'x');
  Duel duel(1);
  duel.own.print.op = duel.theirs.print.op = name.c_str();
  duel.CheckExchange();
}

// The leader names a call that the others' ranks do not come to.
EP_TEST(CallThatTheLeaderAloneMakesIsNamed) {
  SimulatedJob job(2);
  job.AddGroup({0, 1});
  job.SetTimeout(1, kShort);
  const PendingSpanCall leading = job.Attend({.site = 5, .run_id = 9, .rank = 0});
  CheckFailed(
      job.Attend({.site = 6, .run_id = 9, .rank = 1}).Wait(),
      {"because in epoch 1 process 1 was waiting for its own ranks and process "
       "0, which leads, had named execution 9 of call 5, but 0.2 s later rank 1 of "
       "process 1 had come to " +
       std::string(kDescribed) + " instead"});
  CheckFailed(leading.Wait(), {"rank 1 of process 1 had given up, in epoch 1, waiting "
                               "for its own ranks"});
}

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
