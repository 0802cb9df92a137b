// How the fault of one rank's plan stays its own where ranks meet.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <latch>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bad_plan.h"
#include "check.h"
#include "cpu/gather_rows.h"
#include "cpu/plan_fault.h"
#include "fabric/threads/meeting.h"
#include "gathering.h"
#include "plan_reference.h"
#include "threads.h"

namespace jax_ep {
namespace {

constexpr std::int64_t kRanks = 4;
constexpr std::int64_t kRowBytes = 64;

// A rank of a dispatch, with its own tokens, and what came of it.
struct Rank {
  explicit Rank(Gathering own) : gathering(std::move(own)) {}

  Gathering gathering;
  GatherRowsArgs args = {};
  cpu::PlanFault fault;
  std::optional<std::string> failure;
};

using Ranks = std::vector<std::unique_ptr<Rank>>;

Ranks MakeRanks(std::mt19937_64& rng) {
  const Geometry geometry = {.num_ranks = kRanks,
                             .num_local_experts = 2,
                             .num_tokens = 40,
                             .num_topk = 3,
                             .capacity = 300};
  const auto choices = RandomChoices(geometry, Routing::kUniform, rng);
  Ranks ranks;
  for (std::int64_t i = 0; i < kRanks; ++i) {
    ranks.push_back(
        std::make_unique<Rank>(Gathering(geometry, choices, i, kRowBytes, rng)));
    ranks.back()->args = ranks.back()->gathering.Args(false, &ranks.back()->fault);
  }
  return ranks;
}

// Lets all ranks meet, each on a thread of its own; returns when all have been told.
void Meet(MeetingPoint& point, Ranks& ranks, const Schedule& schedule) {
  std::latch told(kRanks);
  OnThreads(kRanks, [&](std::int64_t i) {
    Rank& rank = *ranks[static_cast<std::size_t>(i)];
    const auto own = static_cast<std::size_t>(i);
    point.Attend(
        {.key = {.run_id = 1, .call_site = 1, .group = 0},
         .print = {.op = "dispatch", .rows = 40, .row_bytes = kRowBytes, .plan = 7},
         .rank = static_cast<std::int32_t>(i),
         .num_ranks = kRanks,
         .lent = {{.data = rank.gathering.x[own].data()}},
         .make_work =
             [&](const PeerTables& tables) {
               rank.args.x = PeerTable(tables[0]);
               return std::vector<Work>{cpu::GatherRowsWork(rank.args)};
             },
         .done =
             [&](const auto& failure) {
               rank.failure = failure;
               told.count_down();
             },
         .schedule = schedule});
  });
  told.wait();
}

// Each rank pulls its peers' tokens, whatever is wrong with the others' plans, and only
// its own plan's fault is told it.
void CheckMeeting(const std::vector<std::function<void(RankPlan&)>>& spoil,
                  const std::vector<std::string>& fault_in, std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  HelperThreads helpers;
  MeetingPoint point;
  Ranks good = MakeRanks(rng);
  Meet(point, good, helpers.schedule());
  rng.seed(seed);
  Ranks ranks = MakeRanks(rng);
  for (std::size_t i = 0; i < ranks.size(); ++i) spoil[i](ranks[i]->gathering.plan);
  Meet(point, ranks, helpers.schedule());
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const Case which("rank " + Show(i) + ", seed " + Show(seed));
    EP_CHECK(!ranks[i]->failure.has_value());
    CheckFault(good[i]->fault, "");
    CheckFault(ranks[i]->fault, fault_in[i]);
    if (!fault_in[i].empty()) continue;
    EP_CHECK(ranks[i]->gathering.rows == good[i]->gathering.rows);
  }
}

EP_TEST(PeersOfRanksWithBadPlansGetTheirRows) {
  const auto keep = [](RankPlan&) {};
  const auto list = [](RankPlan& plan) { plan.recv_choice[5] = -7; };
  const auto rows = [](RankPlan& plan) { plan.recv_row[0] = kHighest; };
  const auto counts = [](RankPlan& plan) { plan.recv_counts[1] = kLowest; };
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    CheckMeeting({keep, list, keep, counts}, {"", "recv_choice", "", "recv_counts"},
                 seed);
    CheckMeeting({rows, keep, keep, keep}, {"recv_row", "", "", ""}, seed);
    CheckMeeting({counts, counts, counts, counts},
                 {"recv_counts", "recv_counts", "recv_counts", "recv_counts"}, seed);
  }
}

}  // namespace
}  // namespace jax_ep
