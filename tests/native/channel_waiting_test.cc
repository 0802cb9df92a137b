// Each place where a channel waits for another process, which the test plays: it comes
// late, stops, ends or gives up there, or its memory cannot be had.

#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "fabric/processes/process_words.h"
#include "played_process.h"
#include "simulated_processes.h"

namespace jax_ep {
namespace {

using std::chrono::duration;

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

}  // namespace
}  // namespace jax_ep
