// The emulated kernels of the plan, against the reference and those for CPUs.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "bad_plan.h"
#include "check.h"
#include "cuda/plan.h"
#include "cuda_launches.h"
#include "plan_reference.h"

namespace jax_ep {
namespace {

using Choices = std::vector<std::int32_t>;

template <typename T>
std::vector<std::int32_t> Slice(const T* data, std::int64_t index, std::int64_t size) {
  return {data + index * size, data + (index + 1) * size};
}

// The outputs of some ranks' plans.
class StackedPlans {
 public:
  StackedPlans(const Geometry& g, std::int64_t count, std::mt19937_64& rng)
      : geometry_(g),
        group_sizes_(count * g.num_local_experts, rng),
        kept_(count * g.choices_per_rank(), rng),
        expert_load_(count * g.num_experts(), rng),
        recv_counts_(count * g.num_ranks, rng),
        num_dropped_(count, rng),
        send_rank_(count * g.choices_per_rank(), rng),
        send_row_(count * g.choices_per_rank(), rng),
        recv_choice_(count * g.capacity, rng),
        recv_row_(count * g.capacity, rng),
        group_rows_(count * g.num_local_experts, rng),
        fingerprint_(count, rng) {}

  PlanArrays First() {
    return {.group_sizes = group_sizes_.data(),
            .kept = reinterpret_cast<bool*>(kept_.data()),
            .expert_load = expert_load_.data(),
            .recv_counts = recv_counts_.data(),
            .num_dropped = num_dropped_.data(),
            .send_rank = send_rank_.data(),
            .send_row = send_row_.data(),
            .recv_choice = recv_choice_.data(),
            .recv_row = recv_row_.data(),
            .group_rows = group_rows_.data(),
            .fingerprint = fingerprint_.data()};
  }

  void Check(std::int64_t i, const RankPlan& want) const {
    const std::int64_t num_local = geometry_.num_local_experts;
    const std::int64_t choices = geometry_.choices_per_rank();
    EP_CHECK_EQ(Slice(group_sizes_.data(), i, num_local), want.group_sizes);
    EP_CHECK_EQ(Slice(kept_.data(), i, choices), want.kept);
    EP_CHECK_EQ(Slice(expert_load_.data(), i, geometry_.num_experts()),
                want.expert_load);
    EP_CHECK_EQ(Slice(recv_counts_.data(), i, geometry_.num_ranks), want.recv_counts);
    EP_CHECK_EQ(num_dropped_.data()[i], want.num_dropped);
    EP_CHECK_EQ(Slice(send_rank_.data(), i, choices), want.send_rank);
    EP_CHECK_EQ(Slice(send_row_.data(), i, choices), want.send_row);
    EP_CHECK_EQ(ReceiveList(recv_choice_, i, want), want.recv_choice);
    EP_CHECK_EQ(ReceiveList(recv_row_, i, want), want.recv_row);
    EP_CHECK_EQ(Slice(group_rows_.data(), i, num_local), want.group_rows);
    EP_CHECK_EQ(fingerprint_.data()[i], 0U);
  }

  void CheckBehind() const {
    for (const auto* output :
         {&group_sizes_, &expert_load_, &recv_counts_, &num_dropped_, &send_rank_,
          &send_row_, &recv_choice_, &recv_row_, &group_rows_}) {
      EP_CHECK(output->IsIntactBehind());
    }
    EP_CHECK(kept_.IsIntactBehind());
    EP_CHECK(fingerprint_.IsIntactBehind());
  }

 private:
  // The part in use of a list.
  std::vector<std::int32_t> ReceiveList(const Output<std::int32_t>& lists,
                                        std::int64_t i, const RankPlan& want) const {
    const std::int32_t* list = lists.data() + i * geometry_.capacity;
    return {list, list + want.recv_choice.size()};
  }

  Geometry geometry_;
  Output<std::int32_t> group_sizes_;
  Output<std::uint8_t> kept_;
  Output<std::int32_t> expert_load_;
  Output<std::int32_t> recv_counts_;
  Output<std::int32_t> num_dropped_;
  Output<std::int32_t> send_rank_;
  Output<std::int32_t> send_row_;
  Output<std::int32_t> recv_choice_;
  Output<std::int32_t> recv_row_;
  Output<std::int32_t> group_rows_;
  Output<std::uint32_t> fingerprint_;
};

// Makes the plans of these ranks and compares them with the reference's of all.
void CheckPlansOf(const Choices& ranks, const PlanArgs& args, const Geometry& geometry,
                  const std::vector<RankPlan>& want, std::mt19937_64& rng) {
  const Case which("plans of " + Show(ranks));
  const auto count = static_cast<std::int64_t>(ranks.size());
  StackedPlans plans(geometry, count, rng);
  Output<std::int32_t> workspace(cuda::PlanWorkspace(args), rng);
  const cuda::PlanRanks wanted = {.ranks = ranks.data(), .num_stacked = count};
  if (!EP_CHECK_RAN(
          cuda::MakePlans(args, plans.First(), wanted, workspace.data(), nullptr))) {
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t rank = ranks[static_cast<std::size_t>(i)];
    plans.Check(i, want[static_cast<std::size_t>(rank)]);
  }
  plans.CheckBehind();
  EP_CHECK(workspace.IsIntactBehind());
}

Choices AllRanks(const Geometry& geometry) {
  Choices ranks(static_cast<std::size_t>(geometry.num_ranks));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

// A rank alone, some in any order, or all.
Choices SomeRanks(const Geometry& geometry, std::mt19937_64& rng) {
  Choices ranks = AllRanks(geometry);
  std::ranges::shuffle(ranks, rng);
  if (rng() % 2 == 0) ranks.resize(1);
  if (rng() % 2 == 0) ranks.resize(1 + rng() % ranks.size());
  return ranks;
}

// Runs check(args, wanted plans), with the ranks' choices one after the other or each
// in memory of its own.
template <typename Check>
void WithArguments(const Geometry& geometry, const Choices& choices,
                   std::mt19937_64& rng, Check check) {
  const std::uint64_t seed = rng();
  const Case which(geometry.Text() + " seed=" + Show(seed) + " choices " +
                   Show(choices));
  emulation::SetSeed(seed);
  std::vector<Choices> choices_of;
  std::vector<const void*> table;
  for (std::int64_t rank = 0; rank < geometry.num_ranks; ++rank) {
    choices_of.push_back(Slice(choices.data(), rank, geometry.choices_per_rank()));
    table.push_back(choices_of.back().data());
  }
  const std::int64_t bytes_between =
      geometry.choices_per_rank() * static_cast<std::int64_t>(sizeof(std::int32_t));
  const PlanArgs args = {
      .topk_idx = seed % 2 == 0 ? PeerTable(table.data())
                                : PeerTable(choices.data(), bytes_between),
      .outputs = PeerTable(),
      .num_ranks = geometry.num_ranks,
      .num_tokens = geometry.num_tokens,
      .num_topk = geometry.num_topk,
      .num_experts = geometry.num_experts(),
      .capacity = geometry.capacity,
      .alignment = geometry.alignment,
  };
  check(args, ReferencePlans(geometry, choices));
}

// All ranks' plans, or those of some, are what the reference says.
void CheckPlans(const Geometry& geometry, const Choices& choices,
                std::mt19937_64& rng) {
  WithArguments(geometry, choices, rng, [&](const PlanArgs& args, const auto& want) {
    const bool all = rng() % 2 == 0;
    CheckPlansOf(all ? AllRanks(geometry) : SomeRanks(geometry, rng), args, geometry,
                 want, rng);
  });
}

// Room for all choices wherever they go, for those that come, for all but one of these,
// and for any number of them.
void CheckCapacities(Geometry geometry, Routing routing, std::mt19937_64& rng) {
  const Choices choices = RandomChoices(geometry, routing, rng);
  const std::int64_t incoming = LargestIncoming(geometry, choices);
  const auto any =
      static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(incoming + 2));
  const std::int64_t all = geometry.num_ranks * geometry.choices_per_rank();
  for (const std::int64_t budget : {all, incoming, incoming - 1, any}) {
    if (budget < 0) continue;
    geometry.capacity = std::max<std::int64_t>(1, geometry.CapacityFor(budget));
    CheckPlans(geometry, choices, rng);
  }
}

EP_TEST(MakesTheReferencesPlans) {
  std::mt19937_64 rng(1);
  const auto between = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(rng);
  };
  for (const Routing routing : kAllRoutings) {
    for (int i = 0; i < 4; ++i) {
      CheckCapacities({.num_ranks = between(1, 8),
                       .num_local_experts = between(1, 5),
                       .num_tokens = between(0, 12),
                       .num_topk = between(1, 6),
                       .alignment = std::int64_t{1} << between(0, 4)},
                      routing, rng);
    }
  }
}

// Several tiles per source, and more than a block has warps: as many as one block makes
// plans of, and more.
EP_TEST(PlansManyTokens) {
  std::mt19937_64 rng(2);
  for (const std::int64_t num_tokens : {701, 1001}) {
    for (const Routing routing : kAllRoutings) {
      CheckCapacities({.num_ranks = 3,
                       .num_local_experts = 4,
                       .num_tokens = num_tokens,
                       .num_topk = 3,
                       .alignment = 8},
                      routing, rng);
    }
  }
  // Exactly full tiles, and a token that two tiles share.
  for (const std::int64_t topk : {1, 3}) {
    CheckCapacities({.num_ranks = 2, .num_tokens = 512, .num_topk = topk},
                    Routing::kHoles, rng);
  }
}

// More rows of tables than a block that lays out has warps, so that each sums a run.
EP_TEST(PlansMoreTilesThanWarps) {
  std::mt19937_64 rng(3);
  for (const Routing routing : {Routing::kUniform, Routing::kOneExpert}) {
    CheckCapacities({.num_ranks = 8,
                     .num_local_experts = 2,
                     .num_tokens = 600,
                     .num_topk = 2,
                     .alignment = 4},
                    routing, rng);
  }
}

// So many choices that a rank that overflows looks for its cutoff in three steps.
EP_TEST(PlansAsManyChoicesAsAModelMakes) {
  std::mt19937_64 rng(6);
  CheckCapacities({.num_ranks = 8,
                   .num_local_experts = 32,
                   .num_tokens = 4097,
                   .num_topk = 8,
                   .alignment = 8},
                  Routing::kDistinct, rng);
}

// Groups of experts of which a warp lays out 32 at a time; more of them than one block
// counts.
EP_TEST(PlansManyLocalExperts) {
  std::mt19937_64 rng(4);
  for (const std::int64_t num_local : {31, 32, 33, 70, 319, 320, 361}) {
    CheckCapacities({.num_ranks = 2,
                     .num_local_experts = num_local,
                     .num_tokens = 100,
                     .num_topk = 4,
                     .alignment = 4},
                    Routing::kUniform, rng);
  }
}

// Around as many counters as shared memory has room for.
EP_TEST(PlansMoreCountersThanSharedMemoryHolds) {
  std::mt19937_64 rng(5);
  for (const std::int64_t num_local : {511, 512}) {
    CheckCapacities({.num_ranks = 2,
                     .num_local_experts = num_local,
                     .num_tokens = 150,
                     .num_topk = 4,
                     .alignment = 2},
                    Routing::kDistinct, rng);
  }
  CheckCapacities({.num_ranks = 40, .num_local_experts = 26, .num_tokens = 4},
                  Routing::kUniform, rng);
}

void CheckLonePlans(Geometry geometry, std::int64_t budget, std::int64_t step,
                    std::mt19937_64& rng) {
  geometry.capacity = geometry.CapacityFor(budget);
  const Choices choices = RandomChoices(geometry, Routing::kHoles, rng);
  WithArguments(geometry, choices, rng, [&](const PlanArgs& args, const auto& want) {
    for (std::int64_t rank = 0; rank < geometry.num_ranks; rank += step) {
      CheckPlansOf({static_cast<std::int32_t>(rank)}, args, geometry, want, rng);
    }
  });
}

// Each rank's plan alone; and a few, of as many ranks as may have choices anywhere.
EP_TEST(PlansForOneOfManyRanks) {
  std::mt19937_64 rng(7);
  for (const std::int64_t budget : {100, 480}) {
    CheckLonePlans({.num_ranks = 9,
                    .num_local_experts = 3,
                    .num_tokens = 70,
                    .num_topk = 4,
                    .alignment = 4},
                   budget, 1, rng);
  }
  CheckLonePlans({.num_ranks = 64,
                  .num_local_experts = 2,
                  .num_tokens = 5,
                  .num_topk = 4,
                  .alignment = 4},
                 12, 32, rng);
}

// A rank that is none has no plan; the others have theirs.
EP_TEST(LeavesOutRanksThatDoNotExist) {
  std::mt19937_64 rng(8);
  const Geometry geometry = {
      .num_ranks = 3, .num_tokens = 9, .num_topk = 2, .capacity = 30};
  const Choices choices = RandomChoices(geometry, Routing::kUniform, rng);
  WithArguments(geometry, choices, rng, [&](const PlanArgs& args, const auto& want) {
    for (const std::int32_t none : NumbersOutside(geometry.num_ranks)) {
      StackedPlans plans(geometry, 2, rng);
      Output<std::int32_t> workspace(cuda::PlanWorkspace(args), rng);
      const Choices ranks = {none, 2};
      EP_CHECK_RAN(cuda::MakePlans(args, plans.First(),
                                   {.ranks = ranks.data(), .num_stacked = 2},
                                   workspace.data(), nullptr));
      plans.Check(1, want[2]);
      plans.CheckBehind();
      EP_CHECK(workspace.IsIntactBehind());
    }
  });
}

}  // namespace
}  // namespace jax_ep
