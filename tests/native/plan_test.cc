// The plan on CPUs, against the reference.
#include "cpu/plan.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "common/dropped.h"
#include "plan_reference.h"
#include "threads.h"

namespace jax_ep {
namespace {

void Forwards(std::int64_t count, const std::function<void(std::int64_t)>& body) {
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

void Backwards(std::int64_t count, const std::function<void(std::int64_t)>& body) {
  for (std::int64_t i = count; i > 0; --i) body(i - 1);
}

template <typename T>
std::vector<std::int32_t> Slice(const T* data, std::int64_t index, std::int64_t size) {
  return {data + index * size, data + (index + 1) * size};
}

// Outputs for some ranks' plans, each of exactly the size that PlanArgs says.
class Plans {
 public:
  Plans(const Geometry& geometry, std::vector<std::int64_t> ranks)
      : geometry_(geometry),
        ranks_(std::move(ranks)),
        kept_(new bool[Size(choices())]) {
    for (auto* output : {&group_sizes_, &group_rows_}) {
      output->resize(Size(geometry.num_local_experts));
    }
    for (auto* output : {&recv_choice_, &recv_row_}) {
      output->resize(Size(geometry.capacity));
    }
    expert_load_.resize(Size(geometry.num_experts()));
    recv_counts_.resize(Size(geometry.num_ranks));
    num_dropped_.resize(Size(1));
    send_rank_.resize(Size(choices()));
    send_row_.resize(Size(choices()));
    fingerprints_.resize(Size(1));
  }

  void Run(const std::vector<std::int32_t>& topk_idx,
           const cpu::ParallelFor& parallel_for) {
    // Each rank's choices in memory of their own, so that a read past them is caught.
    std::vector<std::vector<std::int32_t>> choices_of;
    std::vector<const void*> choice_table;
    for (std::int64_t rank = 0; rank < geometry_.num_ranks; ++rank) {
      choices_of.push_back(Slice(topk_idx.data(), rank, choices()));
      choice_table.push_back(choices_of.back().data());
    }
    std::vector<PlanArrays> outputs;
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      outputs.push_back(OutputsAt(static_cast<std::int64_t>(i)));
    }
    std::vector<const void*> output_table(choice_table.size(), nullptr);
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      output_table[static_cast<std::size_t>(ranks_[i])] = &outputs[i];
    }
    const PlanArgs args = {
        .topk_idx = PeerTable(choice_table.data()),
        .outputs = PeerTable(output_table.data()),
        .num_ranks = geometry_.num_ranks,
        .num_tokens = geometry_.num_tokens,
        .num_topk = geometry_.num_topk,
        .num_experts = geometry_.num_experts(),
        .capacity = geometry_.capacity,
        .alignment = geometry_.alignment,
    };
    cpu::RunPlan(args, parallel_for);
  }

  RankPlan At(std::int64_t i) const {
    const std::int64_t num_local = geometry_.num_local_experts;
    RankPlan plan = {
        .group_sizes = Slice(group_sizes_.data(), i, num_local),
        .kept = Slice(kept_.get(), i, choices()),
        .expert_load = Slice(expert_load_.data(), i, geometry_.num_experts()),
        .recv_counts = Slice(recv_counts_.data(), i, geometry_.num_ranks),
        .num_dropped = num_dropped_[static_cast<std::size_t>(i)],
        .send_rank = Slice(send_rank_.data(), i, choices()),
        .send_row = Slice(send_row_.data(), i, choices()),
        .recv_choice = Slice(recv_choice_.data(), i, geometry_.capacity),
        .recv_row = Slice(recv_row_.data(), i, geometry_.capacity),
        .group_rows = Slice(group_rows_.data(), i, num_local),
    };
    const auto received = static_cast<std::size_t>(
        std::accumulate(plan.recv_counts.begin(), plan.recv_counts.end(), 0));
    EP_CHECK(received <= plan.recv_row.size());
    plan.recv_choice.resize(std::min(received, plan.recv_choice.size()));
    plan.recv_row.resize(std::min(received, plan.recv_row.size()));
    return plan;
  }

  PlanArrays OutputsAt(std::int64_t i) {
    const std::int64_t num_local = geometry_.num_local_experts;
    return {
        .group_sizes = group_sizes_.data() + i * num_local,
        .kept = kept_.get() + i * choices(),
        .expert_load = expert_load_.data() + i * geometry_.num_experts(),
        .recv_counts = recv_counts_.data() + i * geometry_.num_ranks,
        .num_dropped = num_dropped_.data() + i,
        .send_rank = send_rank_.data() + i * choices(),
        .send_row = send_row_.data() + i * choices(),
        .recv_choice = recv_choice_.data() + i * geometry_.capacity,
        .recv_row = recv_row_.data() + i * geometry_.capacity,
        .group_rows = group_rows_.data() + i * num_local,
        .fingerprint = fingerprints_.data() + i,
    };
  }

  std::uint32_t fingerprint(std::size_t i) const { return fingerprints_[i]; }

 private:
  std::int64_t choices() const { return geometry_.choices_per_rank(); }
  std::size_t Size(std::int64_t per_rank) const {
    return ranks_.size() * static_cast<std::size_t>(per_rank);
  }

  Geometry geometry_;
  std::vector<std::int64_t> ranks_;
  std::vector<std::int32_t> group_sizes_;
  std::unique_ptr<bool[]> kept_;
  std::vector<std::int32_t> expert_load_;
  std::vector<std::int32_t> recv_counts_;
  std::vector<std::int32_t> num_dropped_;
  std::vector<std::int32_t> send_rank_;
  std::vector<std::int32_t> send_row_;
  std::vector<std::int32_t> recv_choice_;
  std::vector<std::int32_t> recv_row_;
  std::vector<std::int32_t> group_rows_;
  std::vector<std::uint32_t> fingerprints_;
};

std::vector<std::int64_t> AllRanks(const Geometry& geometry) {
  std::vector<std::int64_t> ranks(static_cast<std::size_t>(geometry.num_ranks));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

void CheckSame(const RankPlan& got, const RankPlan& want) {
  EP_CHECK_EQ(got.group_sizes, want.group_sizes);
  EP_CHECK_EQ(got.kept, want.kept);
  EP_CHECK_EQ(got.expert_load, want.expert_load);
  EP_CHECK_EQ(got.recv_counts, want.recv_counts);
  EP_CHECK_EQ(got.num_dropped, want.num_dropped);
  EP_CHECK_EQ(got.send_rank, want.send_rank);
  EP_CHECK_EQ(got.send_row, want.send_row);
  EP_CHECK_EQ(got.recv_choice, want.recv_choice);
  EP_CHECK_EQ(got.recv_row, want.recv_row);
  EP_CHECK_EQ(got.group_rows, want.group_rows);
}

// All plans at once, and each alone, are what the reference says.
void CheckPlans(const Geometry& geometry, const std::vector<std::int32_t>& topk_idx) {
  const Case which(geometry.Text() + " choices " + Show(topk_idx));
  const std::vector<RankPlan> want = ReferencePlans(geometry, topk_idx);
  Plans stacked(geometry, AllRanks(geometry));
  stacked.Run(topk_idx, Forwards);
  for (std::int32_t rank = 0; rank < geometry.num_ranks; ++rank) {
    const auto i = static_cast<std::size_t>(rank);
    CheckSame(stacked.At(rank), want[i]);
    Plans single(geometry, {rank});
    single.Run(topk_idx, Backwards);
    CheckSame(single.At(0), want[i]);
    EP_CHECK_EQ(single.fingerprint(0), stacked.fingerprint(i));
    EP_CHECK_EQ(stacked.fingerprint(i), stacked.fingerprint(0));
  }
}

Geometry RandomGeometry(std::mt19937_64& rng) {
  const auto between = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(rng);
  };
  constexpr std::int64_t kRanks[] = {1, 2, 3, 4, 8};
  return {.num_ranks = kRanks[between(0, 4)],
          .num_local_experts = between(1, 5),
          .num_tokens = between(0, 12),
          .num_topk = between(1, 6),
          .capacity = 1,
          .alignment = std::int64_t{1} << between(0, 4)};
}

// Runs check(geometry, choices) for random ones, of capacity 1 to be set by the check.
template <typename Check>
void ForRandomCases(std::uint64_t seed, int cases_per_routing, Check check) {
  std::mt19937_64 rng(seed);
  for (const Routing routing : kAllRoutings) {
    for (int i = 0; i < cases_per_routing; ++i) {
      const Geometry geometry = RandomGeometry(rng);
      check(geometry, RandomChoices(geometry, routing, rng), rng);
    }
  }
}

using Choices = std::vector<std::int32_t>;

EP_TEST(KeepsAllThatFitsExactly) {
  ForRandomCases(1, 150, [](Geometry geometry, const Choices& choices, auto&) {
    const std::int64_t incoming = LargestIncoming(geometry, choices);
    geometry.capacity = std::max<std::int64_t>(1, geometry.CapacityFor(incoming));
    CheckPlans(geometry, choices);
  });
}

EP_TEST(CutsOffWhenOneRowIsMissing) {
  ForRandomCases(2, 150, [](Geometry geometry, const Choices& choices, auto&) {
    const std::int64_t incoming = LargestIncoming(geometry, choices);
    geometry.capacity = geometry.CapacityFor(incoming) - 1;
    if (incoming > 0 && geometry.capacity > 0) CheckPlans(geometry, choices);
  });
}

EP_TEST(CutsOffAnywhere) {
  ForRandomCases(3, 300, [](Geometry geometry, const Choices& choices, auto& rng) {
    const std::int64_t incoming = LargestIncoming(geometry, choices);
    const auto budget =
        static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(incoming + 2));
    geometry.capacity = std::max<std::int64_t>(1, geometry.CapacityFor(budget));
    CheckPlans(geometry, choices);
  });
}

// Threads that share out the passes write to neighbouring parts of the same outputs.
EP_TEST(ManyThreadsMakeTheSamePlans) {
  std::mt19937_64 rng(4);
  for (int i = 0; i < 8; ++i) {
    Geometry geometry = {.num_ranks = 8,
                         .num_local_experts = 3,
                         .num_tokens = 40,
                         .num_topk = 4,
                         .capacity = 1,
                         .alignment = i % 2 == 0 ? 1 : 4};
    geometry.capacity = geometry.CapacityFor(i < 4 ? 120 : 8 * 40 * 4);
    const Choices choices = RandomChoices(geometry, Routing::kUniform, rng);
    const std::vector<RankPlan> want = ReferencePlans(geometry, choices);
    Plans plans(geometry, AllRanks(geometry));
    plans.Run(choices,
              [](std::int64_t count, const auto& body) { OnThreads(count, body); });
    for (std::size_t rank = 0; rank < want.size(); ++rank) {
      CheckSame(plans.At(static_cast<std::int64_t>(rank)), want[rank]);
    }
  }
}

EP_TEST(PlansForSomeRanksOnly) {
  std::mt19937_64 rng(5);
  Geometry geometry = {.num_ranks = 6,
                       .num_local_experts = 2,
                       .num_tokens = 9,
                       .num_topk = 3,
                       .capacity = 20,
                       .alignment = 2};
  const Choices choices = RandomChoices(geometry, Routing::kUniform, rng);
  const std::vector<RankPlan> want = ReferencePlans(geometry, choices);
  Plans plans(geometry, {2, 3, 5});
  plans.Run(choices, Forwards);
  for (std::size_t i = 0; i < 3; ++i) {
    CheckSame(plans.At(static_cast<std::int64_t>(i)), want[i < 2 ? i + 2 : 5]);
  }
}

std::uint32_t FingerprintOf(const Geometry& geometry, const Choices& choices) {
  Plans plan(geometry, {0});
  plan.Run(choices, Forwards);
  return plan.fingerprint(0);
}

EP_TEST(FingerprintTellsPlansApart) {
  std::mt19937_64 rng(6);
  const Geometry geometry = {.num_ranks = 4,
                             .num_local_experts = 2,
                             .num_tokens = 8,
                             .num_topk = 2,
                             .capacity = 64,
                             .alignment = 2};
  const Choices choices = RandomChoices(geometry, Routing::kHoles, rng);
  std::vector<std::uint32_t> prints = {FingerprintOf(geometry, choices)};
  EP_CHECK_EQ(FingerprintOf(geometry, choices), prints[0]);
  for (std::size_t i = 0; i < choices.size(); ++i) {
    Choices other = choices;
    other[i] = other[i] == 7 ? kDropped : other[i] + 1;
    prints.push_back(FingerprintOf(geometry, other));
  }
  for (std::size_t i = 0; i + 1 < choices.size(); ++i) {
    Choices other = choices;
    std::swap(other[i], other[i + 1]);
    if (other != choices) prints.push_back(FingerprintOf(geometry, other));
  }
  Geometry other = geometry;
  other.capacity = 65;
  prints.push_back(FingerprintOf(other, choices));
  other.alignment = 1;
  prints.push_back(FingerprintOf(other, choices));
  const std::size_t count = prints.size();
  std::ranges::sort(prints);
  const auto repeated = std::ranges::unique(prints);
  EP_CHECK_EQ(count - repeated.size(), count);
}

}  // namespace
}  // namespace jax_ep
