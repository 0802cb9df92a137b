// Exchanges between simulated processes, of all shapes and in all orders.
#include "fabric/processes/channel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "fabric/processes/process_words.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

// Delays a channel's thread at any of its phases.
void Linger(std::int32_t, Phase, Epoch) {
  static std::atomic<std::uint64_t> next_seed{1};
  thread_local std::mt19937_64 rng(next_seed.fetch_add(1, std::memory_order_relaxed));
  Dawdle(rng);
}

// The same for all ranks; at times they lend no bytes, or not even a buffer.
std::vector<std::int64_t> BytesOfTurn(std::int64_t site, std::int64_t turn) {
  std::mt19937_64 rng(static_cast<std::uint64_t>(site * 1000 + turn));
  std::vector<std::int64_t> bytes(rng() % 5);
  for (std::int64_t& of_buffer : bytes) {
    const std::uint64_t kind = turn % 11 == 10 ? 0 : rng() % 6;
    of_buffer =
        kind == 0 ? 0 : static_cast<std::int64_t>(rng() % (kind == 1 ? 4000 : 200));
  }
  return bytes;
}

// Makes the call of a rank over and over, at random times.
void Repeat(SimulatedJob& job, SpanCall call, std::int64_t turns) {
  std::mt19937_64 rng(
      static_cast<std::uint64_t>(std::int64_t{call.rank} * 7 + call.site * 31));
  for (call.turn = 0; call.turn < turns; ++call.turn) {
    call.bytes = BytesOfTurn(call.site, call.turn);
    call.num_chunks = 1 + call.turn % 3;
    Dawdle(rng);
    if (!job.Works(call)) return;
  }
}

void CheckMeetOverAndOver(const std::vector<std::int32_t>& process_of,
                          std::int64_t turns) {
  const Case which("ranks in processes " + Show(process_of));
  SimulatedJob job(1 + *std::ranges::max_element(process_of), Linger);
  job.AddGroup(process_of);
  OnThreads(static_cast<std::int64_t>(process_of.size()), [&](std::int64_t rank) {
    Repeat(job, {.rank = static_cast<std::int32_t>(rank)}, turns);
  });
}

EP_TEST(OneRankPerProcess) {
  CheckMeetOverAndOver({0, 1}, 400);
  CheckMeetOverAndOver({0, 1, 2}, 200);
  CheckMeetOverAndOver({0, 1, 2, 3}, 100);
}

EP_TEST(SeveralRanksPerProcess) {
  CheckMeetOverAndOver({0, 0, 1, 1}, 200);
  CheckMeetOverAndOver({0, 0, 1, 1, 2, 2}, 80);
  CheckMeetOverAndOver({0, 0, 1, 1, 2, 2, 3, 3}, 50);
}

EP_TEST(UnevenProcesses) {
  CheckMeetOverAndOver({0, 1, 1, 1}, 150);
  CheckMeetOverAndOver({0, 0, 0, 1, 2, 2}, 80);
}

// Neither does process 0 lead nor do a process's ranks follow each other.
EP_TEST(RanksInAnyOrder) {
  CheckMeetOverAndOver({1, 0}, 150);
  CheckMeetOverAndOver({2, 0, 1, 0, 2, 1, 1}, 60);
}

// A job has processes without ranks of a group.
EP_TEST(GroupsOfSomeProcesses) { CheckMeetOverAndOver({3, 1, 3}, 100); }

// XLA runs independent calls in any order, on each device its own.
EP_TEST(CallsComeTogetherInAnyOrder) {
  constexpr std::int64_t kSites = 4;
  const std::vector<std::int32_t> process_of = {0, 0, 1, 2};
  SimulatedJob job(3, Linger);
  job.AddGroup(process_of);
  OnThreads(kSites * 4, [&](std::int64_t thread) {
    Repeat(
        job,
        {.site = thread % kSites, .rank = static_cast<std::int32_t>(thread / kSites)},
        50);
  });
}

// In no two processes in the same order, and all before any has ended.
EP_TEST(TheLeadersOrderWins) {
  constexpr std::int32_t kRanks = 3;
  constexpr std::int64_t kSites = 6;
  SimulatedJob job(kRanks, Linger);
  job.AddGroup({0, 1, 2});
  for (std::int64_t run = 0; run < 20; ++run) {
    OnThreads(kRanks, [&](std::int64_t rank) {
      std::mt19937_64 rng(static_cast<std::uint64_t>(run * kRanks + rank));
      std::vector<std::pair<SpanCall, PendingSpanCall>> calls;
      for (std::int64_t i = 0; i < kSites; ++i) {
        const std::int64_t site = (i * (rank == 1 ? 5 : 1) + rank) % kSites;
        const SpanCall call = {
            .site = site,
            .run_id = run,
            .print = {.op = "combine", .rows = site, .row_bytes = run},
            .rank = static_cast<std::int32_t>(rank),
            .bytes = BytesOfTurn(site, run)};
        Dawdle(rng);
        calls.emplace_back(call, job.Attend(call));
      }
      for (const auto& [call, pending] : calls) {
        CheckWorked(call, kRanks, pending.Wait());
      }
    });
  }
}

// One thread brings all ranks of all processes: nobody is waited for in Attend.
EP_TEST(OneThreadBringsAllRanks) {
  SimulatedJob job(2);
  job.AddGroup({0, 0, 1, 1});
  std::vector<std::pair<SpanCall, PendingSpanCall>> calls;
  for (std::int64_t site = 0; site < 20; ++site) {
    for (std::int32_t rank = 3; rank >= 0; --rank) {
      for (const auto& [call, pending] : calls) {
        if (call.site == site) EP_CHECK(!pending.HasEnded());
      }
      const SpanCall call = {.site = site, .rank = rank};
      calls.emplace_back(call, job.Attend(call));
    }
  }
  for (const auto& [call, pending] : calls) CheckWorked(call, 4, pending.Wait());
}

// Groups along other axes of a mesh, and meshes that share processes.
EP_TEST(GroupsDoNotMix) {
  const std::vector<std::vector<std::int32_t>> groups = {
      {0, 0, 1, 1}, {0, 0, 1, 1}, {0, 1, 2}, {2, 0}};
  SimulatedJob job(3, Linger);
  std::vector<SpanCall> calls;
  for (const auto& process_of : groups) {
    const std::int32_t group = job.AddGroup(process_of);
    for (std::size_t rank = 0; rank < process_of.size(); ++rank) {
      calls.push_back({.group = group, .rank = static_cast<std::int32_t>(rank)});
    }
  }
  OnThreads(static_cast<std::int64_t>(calls.size()), [&](std::int64_t thread) {
    Repeat(job, calls[static_cast<std::size_t>(thread)], 70);
  });
}

// Epochs only grow, and phases come in their order.
EP_TEST(WordsTellWhatGoesOn) {
  constexpr std::int64_t kTurns = 30;
  std::vector<std::pair<Phase, Epoch>> phases[2];
  {
    SimulatedJob job(2, [&](std::int32_t process, Phase phase, Epoch epoch) {
      phases[process].emplace_back(phase, epoch);
    });
    job.AddGroup({0, 1});
    OnThreads(2, [&](std::int64_t rank) {
      Repeat(job, {.rank = static_cast<std::int32_t>(rank)}, kTurns);
    });
    for (const std::int32_t process : {0, 1}) {
      // Written before the ranks were told.
      const ProcessWords& words = job.shown(0, process).words;
      EP_CHECK_EQ(words.announced.load(), process == 0 ? kTurns : 0);
      EP_CHECK_EQ(words.published.load(), kTurns);
      EP_CHECK_EQ(words.finished.load(), kTurns);
      EP_CHECK_EQ(words.gave_up.load(), 0);
    }
  }
  std::vector<std::pair<Phase, Epoch>> want[2];
  for (auto& of_process : want) of_process.emplace_back(Phase::kConnecting, 1);
  for (Epoch epoch = 1; epoch <= kTurns; ++epoch) {
    for (const Phase phase :
         {Phase::kFollowing, Phase::kMeeting, Phase::kReusing, Phase::kPublishing,
          Phase::kAwaiting, Phase::kPulling, Phase::kIdle}) {
      if (phase >= Phase::kReusing || phase == Phase::kIdle) {
        want[0].emplace_back(phase, epoch);
      }
      want[1].emplace_back(phase, epoch);
    }
  }
  EP_CHECK(phases[0] == want[0]);
  EP_CHECK(phases[1] == want[1]);
}

// Between exchanges nobody keeps a core busy.
EP_TEST(WaitingKeepsNoCoreBusy) {
  SimulatedJob job(2);
  job.AddGroup({0, 1});
  OnThreads(2, [&](std::int64_t rank) {
    job.Works({.rank = static_cast<std::int32_t>(rank)});
  });
  const SpanCall first = {.rank = 0, .turn = 1};
  const PendingSpanCall pending = job.Attend(first);
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EP_CHECK(std::clock() - before < CLOCKS_PER_SEC / 10);
  const SpanCall second = {.rank = 1, .turn = 1};
  job.Works(second);
  CheckWorked(first, 2, pending.Wait());
}

}  // namespace
}  // namespace jax_ep
