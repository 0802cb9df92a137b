// Meetings to which some ranks do not come, or come with another call.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <functional>
#include <latch>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "captured_reports.h"
#include "check.h"
#include "differing_calls.h"
#include "fabric/threads/meeting.h"
#include "meeting_calls.h"
#include "threads.h"

namespace jax_ep {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::duration;

constexpr duration<double> kShort{0.2};
// A call that ends much sooner than this did not wait for it.
constexpr duration<double> kLong{60};
constexpr duration<double> kAtOnce{20};

Call CallOf(std::int32_t rank, std::int32_t num_ranks) {
  return {.rank = rank, .num_ranks = num_ranks, .num_chunks = 2};
}

// Makes the call and waits for its end.
Outcome Make(MeetingPoint& point, const Call& call) {
  return PendingCall(point, call, AtOnce).Wait();
}

// All ranks meet over and over, after whatever failed.
void CheckGoesOn(MeetingPoint& point, std::int32_t num_ranks, std::int64_t run_id) {
  HelperThreads helpers;
  OnThreads(num_ranks, [&](std::int64_t rank) {
    Call call = CallOf(static_cast<std::int32_t>(rank), num_ranks);
    call.key.run_id = run_id;
    for (call.turn = 0; call.turn < 5; ++call.turn) {
      CheckWorked(call, PendingCall(point, call, helpers.schedule()).Wait());
    }
  });
}

EP_TEST(ThosePresentFailWhenOthersNeverCome) {
  MeetingPoint point;
  point.SetTimeout(kShort);
  const auto start = Clock::now();
  OnThreads(5, [&](std::int64_t thread) {
    const auto rank = static_cast<std::int32_t>(thread);
    if (rank == 2 || rank == 4) return;
    const Outcome outcome = Make(point, CallOf(rank, 5));
    CheckFailed(outcome, {"dispatch: rank " + Show(rank) + " of 5 gave up",
                          " waited 0.2 s for ranks 2, 4 to come"});
  });
  EP_CHECK(Clock::now() - start >= kShort);
  EP_CHECK(Clock::now() - start < kAtOnce);
  CheckGoesOn(point, 5, 2);
}

// One line, whoever came, with all that the error says; and none for those that worked.
EP_TEST(MeetingsThatFailAreReportedOnce) {
  const CapturedReports reports;
  MeetingPoint point;
  point.SetTimeout(kShort);
  const PendingCall first(point, CallOf(1, 4), AtOnce);
  CheckFailed(Make(point, CallOf(0, 4)),
              {"rank 1 waited 0.2 s for ranks 2, 3 to come"});
  const std::string waited =
      "dispatch: ranks 0, 1 of 4 gave up, because rank 1 waited 0.2 s for ranks 2, 3 "
      "to come";
  EP_CHECK_EQ(Show(reports.texts()), "[" + waited + "]");
  for (const std::int32_t rank : {2, 3}) Make(point, CallOf(rank, 4));
  CheckGoesOn(point, 4, 1);
  EP_CHECK_EQ(reports.texts().size(), 1);
  point.SetTimeout(kLong);
  const PendingCall one(point, CallOf(1, 2), AtOnce);
  Call other = CallOf(0, 2);
  other.print.plan = 8;
  Make(point, other);
  const std::string differed =
      "dispatch: ranks 0, 1 of 2 gave up, because rank 1 called dispatch of [64 rows, "
      "256 bytes] with plan fingerprint 7 and rank 0 called dispatch of [64 rows, 256 "
      "bytes] with plan fingerprint 8";
  EP_CHECK_EQ(Show(reports.texts()), "[" + waited + ", " + differed + "]");
}

EP_TEST(LateRanksFailAtOnce) {
  MeetingPoint point;
  point.SetTimeout(kShort);
  CheckFailed(Make(point, CallOf(1, 3)),
              {"rank 1 of 3", "rank 1 waited 0.2 s for ranks 0, 2 to come"});
  point.SetTimeout(kLong);
  const auto start = Clock::now();
  for (const std::int32_t rank : {2, 0}) {
    CheckFailed(Make(point, CallOf(rank, 3)),
                {"rank " + Show(rank) + " of 3 gave up",
                 "rank 1 waited 0.2 s for ranks 0, 2 to come"});
  }
  EP_CHECK(Clock::now() - start < kAtOnce);
  // All have been told: the same call starts afresh.
  CheckGoesOn(point, 3, 1);
}

// A rank that goes on to the next turn before the late one has come to the failed one.
EP_TEST(LateRankCatchesUp) {
  MeetingPoint point;
  point.SetTimeout(kShort);
  CheckFailed(Make(point, CallOf(0, 2)), {"for rank 1 to come"});
  point.SetTimeout(kLong);
  const PendingCall next(point, CallOf(0, 2), AtOnce);
  CheckFailed(Make(point, CallOf(1, 2)), {"rank 0 waited 0.2 s"});
  EP_CHECK(!next.HasEnded());
  CheckWorked(CallOf(1, 2), Make(point, CallOf(1, 2)));
  CheckWorked(CallOf(0, 2), next.Wait());
}

// Time-outs of meetings that wait at the same time differ; each keeps its own.
EP_TEST(EachMeetingKeepsItsTimeout) {
  MeetingPoint point;
  HelperThreads helpers;
  std::vector<PendingCall> pending;
  for (const double seconds : {60.0, 0.3, 0.1}) {
    point.SetTimeout(duration<double>(seconds));
    Call call = CallOf(0, 2);
    call.key.call_site = static_cast<std::int64_t>(seconds * 10);
    pending.emplace_back(point, call, helpers.schedule());
  }
  CheckFailed(pending[2].Wait(), {"rank 0 waited 0.1 s for rank 1 to come"});
  EP_CHECK(!pending[1].HasEnded());
  CheckFailed(pending[1].Wait(), {"rank 0 waited 0.3 s for rank 1 to come"});
  EP_CHECK(!pending[0].HasEnded());
}

EP_TEST(ErrorSaysWhereTheMissingRankWaitsInstead) {
  MeetingPoint point;
  point.SetTimeout(kLong);
  Call elsewhere = CallOf(1, 2);
  elsewhere.key.call_site = 2;
  elsewhere.print = {.op = "combine", .rows = 96, .row_bytes = 512, .plan = 11};
  const PendingCall other(point, elsewhere, AtOnce);
  point.SetTimeout(kShort);
  CheckFailed(Make(point, CallOf(0, 2)),
              {"for rank 1 to come; rank 1 waits in another call, combine of "
               "[96 rows, 512 bytes] with plan fingerprint 11"});
  // The other call was not hurt by it.
  Call late = elsewhere;
  late.rank = 0;
  CheckWorked(late, Make(point, late));
  CheckWorked(elsewhere, other.Wait());
}

// Nobody is said to wait elsewhere who waits in another run, group or mesh.
EP_TEST(ErrorNamesNoUnrelatedCall) {
  std::vector<Call> unrelated(3, CallOf(1, 2));
  unrelated[0].key.run_id = 2;
  unrelated[1].key.group = 1;
  unrelated[2].key.call_site = 2;
  unrelated[2].num_ranks = 3;
  for (const Call& call : unrelated) {
    MeetingPoint point;
    point.SetTimeout(kLong);
    const PendingCall other(point, call, AtOnce);
    point.SetTimeout(kShort);
    const Outcome outcome = Make(point, CallOf(0, 2));
    CheckFailed(outcome, {"for rank 1 to come"});
    EP_CHECK(outcome.failure.value_or("").find("another call") == std::string::npos);
  }
}

void CheckMismatch(const CallPrint& print, const std::string& described) {
  MeetingPoint point;
  HelperThreads helpers;
  const auto start = Clock::now();
  const PendingCall first(point, CallOf(2, 4), helpers.schedule());
  const PendingCall second(point, CallOf(0, 4), helpers.schedule());
  Call other = CallOf(3, 4);
  other.print = print;
  const PendingCall third(point, other, helpers.schedule());
  const PendingCall late(point, CallOf(1, 4), helpers.schedule());
  for (const PendingCall& call : {first, second, third, late}) {
    CheckFailed(call.Wait(), {std::string("because rank 2 called ") + kUsualCall +
                              " and rank 3 called " + described});
  }
  EP_CHECK(Clock::now() - start < kAtOnce);
  CheckGoesOn(point, 4, 1);
}

EP_TEST(RanksThatCallDifferentThingsAllFail) {
  for (const DifferingCall& other : DifferingCalls()) {
    CheckMismatch(other.print, other.described);
  }
}

// No table could hold what they lend.
EP_TEST(RanksThatLendUnequallyManyBuffersFail) {
  for (const std::int64_t other_lends : {0, 1, 3}) {
    MeetingPoint point;
    const PendingCall first(point, CallOf(0, 2), AtOnce);
    Call other = CallOf(1, 2);
    other.num_lent = other_lends;
    const std::vector<std::string> parts = {
        "because rank 0 called dispatch of [64 rows, 256 bytes] with plan fingerprint "
        "7 and rank 1 called dispatch of [64 rows, 256 bytes] with plan fingerprint 7; "
        "a rank lends 2 buffers in the one and " +
        Show(other_lends) + " in the other"};
    CheckFailed(Make(point, other), parts);
    CheckFailed(first.Wait(), parts);
    CheckGoesOn(point, 2, 1);
  }
}

// The last to come is the one that differs: nobody's work runs.
EP_TEST(TheLastRanksMismatchIsNoticed) {
  MeetingPoint point;
  const PendingCall first(point, CallOf(0, 2), AtOnce);
  Call other = CallOf(1, 2);
  other.print.plan = 8;
  const std::vector<std::string> parts = {"with plan fingerprint 8"};
  CheckFailed(Make(point, other), parts);
  CheckFailed(first.Wait(), parts);
  CheckGoesOn(point, 2, 1);
}

// The same name at another address is the same op.
EP_TEST(OpsAreComparedByName) {
  MeetingPoint point;
  const std::string name = "dispatch";
  Call call = CallOf(1, 2);
  call.print.op = name.c_str();
  const PendingCall first(point, CallOf(0, 2), AtOnce);
  CheckWorked(call, Make(point, call));
  CheckWorked(CallOf(0, 2), first.Wait());
}

// The last rank comes about when the others' time is up: all of them do it, or none.
EP_TEST(RanksAgreeOnWhetherTheLastCameInTime) {
  constexpr std::int32_t kRanks = 4;
  MeetingPoint point;
  HelperThreads helpers;
  point.SetTimeout(std::chrono::milliseconds(3));
  for (std::int64_t run = 0; run < 150; ++run) {
    std::vector<Outcome> outcomes(kRanks);
    const auto call_of = [&](std::int64_t rank) {
      Call call = CallOf(static_cast<std::int32_t>(rank), kRanks);
      call.key.run_id = run;
      return call;
    };
    OnThreads(kRanks, [&](std::int64_t rank) {
      std::mt19937_64 rng(static_cast<std::uint64_t>(run * kRanks + rank));
      if (rank == run % kRanks) {
        std::this_thread::sleep_for(std::chrono::microseconds(2500 + rng() % 1000));
      }
      outcomes[static_cast<std::size_t>(rank)] =
          PendingCall(point, call_of(rank), helpers.schedule()).Wait();
    });
    const bool failed = outcomes[0].failure.has_value();
    for (std::int32_t rank = 0; rank < kRanks; ++rank) {
      const Outcome& outcome = outcomes[static_cast<std::size_t>(rank)];
      if (failed) {
        CheckFailed(outcome, {" waited 0.0 s for rank"});
      } else {
        CheckWorked(call_of(rank), outcome);
      }
    }
  }
}

// Failures are kept for late ranks, but not those of ages ago.
EP_TEST(OldFailuresAreForgotten) {
  constexpr std::int64_t kFailures = 4200;
  MeetingPoint point;
  point.SetTimeout(duration<double>(0));
  Call call = CallOf(0, 2);
  for (call.key.run_id = 0; call.key.run_id < kFailures; ++call.key.run_id) {
    CheckFailed(Make(point, call), {"rank 0 waited 0.0 s for rank 1"});
  }
  call.rank = 1;
  call.key.run_id = kFailures - 1;
  CheckFailed(Make(point, call), {"rank 0 waited 0.0 s for rank 1"});
  call.key.run_id = 0;
  CheckFailed(Make(point, call), {"rank 1 waited 0.0 s for rank 0"});
}

// Whoever is told of a failure may make another call from there, and another.
EP_TEST(CallsMayFollowAFailure) {
  MeetingPoint point;
  HelperThreads helpers;
  point.SetTimeout(std::chrono::milliseconds(20));
  const auto ended = std::make_shared<std::latch>(1);
  Attend(point, CallOf(0, 2), helpers.schedule(), [&, ended](const Outcome& first) {
    CheckFailed(first, {"for rank 1 to come"});
    Call call = CallOf(0, 2);
    call.key.run_id = 2;
    Attend(point, call, helpers.schedule(), [ended](const Outcome& second) {
      CheckFailed(second, {"for rank 1 to come"});
      ended->count_down();
    });
  });
  ended->wait();
}

// What has failed and is kept for late ranks costs nothing.
EP_TEST(FailedMeetingsKeepNoCoreBusy) {
  MeetingPoint point;
  point.SetTimeout(std::chrono::milliseconds(10));
  CheckFailed(Make(point, CallOf(0, 2)), {"for rank 1 to come"});
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EP_CHECK(std::clock() - before < CLOCKS_PER_SEC / 10);
}

// A program that ends while ranks still wait does not wait for them.
EP_TEST(PointMayGoWhileRanksWait) {
  const auto start = Clock::now();
  {
    MeetingPoint point;
    const PendingCall pending(point, CallOf(0, 2), AtOnce);
    EP_CHECK(!pending.HasEnded());
  }
  EP_CHECK(Clock::now() - start < kAtOnce);
}

}  // namespace
}  // namespace jax_ep
