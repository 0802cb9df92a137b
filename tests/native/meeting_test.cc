// Meetings of threads, many at a time and in all orders.
#include "fabric/threads/meeting.h"

#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <latch>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "meeting_calls.h"
#include "threads.h"

namespace jax_ep {
namespace {

using std::chrono::duration;

// Makes the call `turns` times over, each with a number of chunks of its own, now and
// then of none, and dawdles between them.
void Repeat(MeetingPoint& point, Call call, std::int64_t turns,
            const Schedule& schedule, std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  for (call.turn = 0; call.turn < turns; ++call.turn) {
    call.num_chunks = rng() % 4 == 0 ? 0 : static_cast<std::int64_t>(rng() % 12);
    Dawdle(rng);
    CheckWorked(call, PendingCall(point, call, schedule).Wait());
  }
}

EP_TEST(RanksMeetOverAndOver) {
  constexpr std::pair<std::int32_t, std::int64_t> kRanksAndTurns[] = {
      {1, 200}, {2, 400}, {3, 300}, {8, 100}, {64, 15}};
  for (const auto& [num_ranks, turns] : kRanksAndTurns) {
    MeetingPoint point;
    HelperThreads helpers;
    OnThreads(num_ranks, [&, n = num_ranks, t = turns](std::int64_t rank) {
      const Call call = {.rank = static_cast<std::int32_t>(rank), .num_ranks = n};
      Repeat(point, call, t, helpers.schedule(),
             static_cast<std::uint64_t>(rank) * 100 + static_cast<std::uint64_t>(n));
    });
  }
}

EP_TEST(RanksLendAnyNumberOfBuffers) {
  constexpr std::int32_t kRanks = 3;
  for (const std::int64_t num_lent : {0, 1, 2, 3, 17}) {
    MeetingPoint point;
    HelperThreads helpers;
    OnThreads(kRanks, [&](std::int64_t rank) {
      const Call call = {.rank = static_cast<std::int32_t>(rank),
                         .num_ranks = kRanks,
                         .num_lent = num_lent};
      Repeat(point, call, 50, helpers.schedule(), static_cast<std::uint64_t>(rank));
    });
  }
}

// Runs in flight, calls of one program that XLA may run in any order, and groups along
// other axes of the mesh: each device is in all of its calls at the same time.
EP_TEST(CallsInFlightDoNotMix) {
  constexpr std::int32_t kRanks = 4;
  MeetingPoint point;
  HelperThreads helpers;
  constexpr std::int64_t kThreads = std::int64_t{2} * 2 * 3 * kRanks;
  OnThreads(kThreads, [&](std::int64_t thread) {
    const Call call = {
        .key = {.run_id = thread / kRanks / 6,
                .call_site = thread / kRanks % 3,
                .group = static_cast<std::int32_t>(thread / kRanks / 3 % 2)},
        .rank = static_cast<std::int32_t>(thread % kRanks),
        .num_ranks = kRanks};
    Repeat(point, call, 60, helpers.schedule(), static_cast<std::uint64_t>(thread));
  });
}

// Each device makes all of the run's calls, in an order of its own, before any ends.
EP_TEST(CallsMayComeInAnyOrder) {
  constexpr std::int32_t kRanks = 4;
  constexpr std::int64_t kSites = 6;
  MeetingPoint point;
  HelperThreads helpers;
  for (std::int64_t run = 0; run < 50; ++run) {
    OnThreads(kRanks, [&](std::int64_t rank) {
      std::mt19937_64 rng(static_cast<std::uint64_t>(run * kRanks + rank));
      std::vector<std::pair<Call, PendingCall>> calls;
      for (std::int64_t i = 0; i < kSites; ++i) {
        const Call call = {
            .key = {.run_id = run, .call_site = (i * 5 + rank) % kSites, .group = 0},
            .rank = static_cast<std::int32_t>(rank),
            .num_ranks = kRanks};
        Dawdle(rng);
        calls.emplace_back(call, PendingCall(point, call, helpers.schedule()));
      }
      for (const auto& [call, pending] : calls) CheckWorked(call, pending.Wait());
    });
  }
}

// A mesh axis that the exchange does not know brings every rank twice. Who meets whom
// is open, but everybody meets one of each rank.
EP_TEST(RepeatedRanksMeetInFullGroups) {
  constexpr std::int32_t kRanks = 4;
  MeetingPoint point;
  HelperThreads helpers;
  OnThreads(std::int64_t{2} * kRanks, [&](std::int64_t thread) {
    std::mt19937_64 rng(static_cast<std::uint64_t>(thread));
    const Call call = {.rank = static_cast<std::int32_t>(thread % kRanks),
                       .num_ranks = kRanks};
    for (int i = 0; i < 200; ++i) {
      Dawdle(rng);
      CheckWorked(call, PendingCall(point, call, helpers.schedule()).Wait());
    }
  });
}

EP_TEST(ProgramsOfSeveralRankCountsMeetAtOnePoint) {
  MeetingPoint point;
  HelperThreads helpers;
  OnThreads(2 + 3 + 5, [&](std::int64_t thread) {
    const std::int64_t first = thread < 2 ? 0 : thread < 5 ? 2 : 5;
    const std::int32_t num_ranks = thread < 2 ? 2 : thread < 5 ? 3 : 5;
    const Call call = {.key = {.run_id = num_ranks, .call_site = 1, .group = 0},
                       .rank = static_cast<std::int32_t>(thread - first),
                       .num_ranks = num_ranks};
    Repeat(point, call, 100, helpers.schedule(), static_cast<std::uint64_t>(thread));
  });
}

// Nobody waits in Attend: one thread can bring all ranks, in several calls at once.
EP_TEST(OneThreadBringsAllRanks) {
  constexpr std::int32_t kRanks = 5;
  constexpr std::int64_t kSites = 3;
  MeetingPoint point;
  std::vector<std::pair<Call, PendingCall>> calls;
  for (std::int32_t rank = 0; rank < kRanks; ++rank) {
    for (std::int64_t site = 0; site < kSites; ++site) {
      for (const auto& [call, pending] : calls) {
        EP_CHECK_EQ(pending.HasEnded(),
                    rank == kRanks - 1 && call.key.call_site < site);
      }
      const Call call = {.key = {.run_id = 1, .call_site = site, .group = 0},
                         .rank = rank,
                         .num_ranks = kRanks,
                         .num_chunks = rank};
      calls.emplace_back(call, PendingCall(point, call, AtOnce));
    }
  }
  for (const auto& [call, pending] : calls) CheckWorked(call, pending.Wait());
}

// What a rank does next may need all of its peers to have got there, too.
EP_TEST(WhatComesNextMayWaitForPeers) {
  constexpr std::int32_t kRanks = 6;
  MeetingPoint point;
  HelperThreads helpers(kRanks);
  for (std::int64_t run = 0; run < 100; ++run) {
    std::barrier all_there(kRanks);
    const auto all_gone = std::make_shared<std::latch>(kRanks);
    OnThreads(kRanks, [&](std::int64_t rank) {
      const Call call = {.key = {.run_id = run, .call_site = 1, .group = 0},
                         .rank = static_cast<std::int32_t>(rank),
                         .num_ranks = kRanks,
                         .num_chunks = 4};
      Attend(point, call, helpers.schedule(),
             [&, call, all_gone](const Outcome& outcome) {
               CheckWorked(call, outcome);
               all_there.arrive_and_wait();
               all_gone->count_down();
             });
    });
    all_gone->wait();
  }
}

// Makes the call again from where it ended, as XLA does in a loop, until all turns are
// through.
void Chain(MeetingPoint& point, Call call, std::int64_t turns, const Schedule& schedule,
           std::latch& ended) {
  if (call.turn == turns) return ended.count_down();
  call.num_chunks = (call.turn + call.rank) % 5;
  Attend(point, call, schedule, [&, call, turns, schedule](const Outcome& outcome) {
    CheckWorked(call, outcome);
    Call next = call;
    ++next.turn;
    Chain(point, next, turns, schedule, ended);
  });
}

EP_TEST(CallsFollowFromTheOnesBefore) {
  for (const std::int32_t num_ranks : {2, 7}) {
    MeetingPoint point;
    std::latch ended(num_ranks);
    HelperThreads helpers;
    for (std::int32_t rank = 0; rank < num_ranks; ++rank) {
      const Call call = {.rank = rank, .num_ranks = num_ranks};
      Chain(point, call, 300, helpers.schedule(), ended);
    }
    ended.wait();
  }
}

EP_TEST(TimeoutIsSetAndGivenBack) {
  MeetingPoint point;
  EP_CHECK_EQ(point.SetTimeout(duration<double>(2.5)).count(), kDefaultWait.count());
  EP_CHECK_EQ(point.SetTimeout(duration<double>(0.25)).count(), 2.5);
}

EP_TEST(TimeoutMayBeSetWhileRanksMeet) {
  MeetingPoint point;
  HelperThreads helpers;
  OnThreads(3, [&](std::int64_t thread) {
    if (thread == 2) {
      for (int i = 0; i < 1000; ++i) point.SetTimeout(duration<double>(60 + i));
      return;
    }
    const Call call = {.rank = static_cast<std::int32_t>(thread), .num_ranks = 2};
    Repeat(point, call, 50, helpers.schedule(), static_cast<std::uint64_t>(thread));
  });
}

// No clock holds such a time-out, and one rank alone waits for nobody.
EP_TEST(ExtremeTimeoutsWork) {
  MeetingPoint point;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (const double seconds : {1e300, kInf, 0.0}) {
    point.SetTimeout(duration<double>(seconds));
    const Call alone = {.num_chunks = 3};
    CheckWorked(alone, PendingCall(point, alone, AtOnce).Wait());
    if (seconds == 0) continue;
    const Call first = {.rank = 0, .num_ranks = 2};
    const Call second = {.rank = 1, .num_ranks = 2};
    const PendingCall pending(point, first, AtOnce);
    CheckWorked(second, PendingCall(point, second, AtOnce).Wait());
    CheckWorked(first, pending.Wait());
  }
}

}  // namespace
}  // namespace jax_ep
