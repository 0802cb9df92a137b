// Implements plan_reference.h by sorting, sharing nothing with what it tests.
#include "plan_reference.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "common/dropped.h"

namespace jax_ep {
namespace {

struct Choice {
  std::int64_t expert;
  std::int64_t source;
  std::int64_t token;
  std::int64_t k;
  std::int64_t flat;  // in [num_ranks, num_tokens, num_topk]
};

std::vector<Choice> Incoming(const Geometry& geometry,
                             const std::vector<std::int32_t>& choices,
                             std::int64_t dest) {
  std::vector<Choice> incoming;
  for (std::size_t i = 0; i < choices.size(); ++i) {
    const auto flat = static_cast<std::int64_t>(i);
    const Choice choice = {.expert = choices[i],
                           .source = flat / geometry.choices_per_rank(),
                           .token = flat / geometry.num_topk % geometry.num_tokens,
                           .k = flat % geometry.num_topk,
                           .flat = flat};
    if (choice.expert != kDropped &&
        choice.expert / geometry.num_local_experts == dest) {
      incoming.push_back(choice);
    }
  }
  return incoming;
}

// What rank `dest` keeps, in row order.
std::vector<Choice> KeptBy(const Geometry& geometry,
                           const std::vector<std::int32_t>& choices,
                           std::int64_t dest) {
  std::vector<Choice> kept = Incoming(geometry, choices, dest);
  std::ranges::sort(kept, {},
                    [](const Choice& c) { return std::tuple(c.k, c.token, c.source); });
  const std::int64_t budget =
      geometry.capacity - geometry.num_local_experts * (geometry.alignment - 1);
  if (static_cast<std::int64_t>(kept.size()) > budget) {
    kept.resize(static_cast<std::size_t>(budget));
  }
  std::ranges::sort(kept, {}, [](const Choice& c) {
    return std::tuple(c.expert, c.source, c.token, c.k);
  });
  return kept;
}

RankPlan EmptyPlan(const Geometry& geometry) {
  const auto choices = static_cast<std::size_t>(geometry.choices_per_rank());
  const auto num_local = static_cast<std::size_t>(geometry.num_local_experts);
  RankPlan plan;
  plan.group_sizes.resize(num_local);
  plan.group_rows.resize(num_local);
  plan.expert_load.resize(static_cast<std::size_t>(geometry.num_experts()));
  plan.recv_counts.resize(static_cast<std::size_t>(geometry.num_ranks));
  plan.kept.resize(choices);
  plan.send_rank.resize(choices, kDropped);
  plan.send_row.resize(choices, kDropped);
  return plan;
}

// Fills in what rank `dest` receives, and at the other ends where it has its rows.
void Receive(const Geometry& geometry, const std::vector<Choice>& kept,
             std::int64_t dest, std::vector<RankPlan>& plans) {
  RankPlan& plan = plans[static_cast<std::size_t>(dest)];
  std::map<std::int64_t, std::int32_t> row_of;
  std::size_t next = 0;
  std::int32_t row = 0;
  for (std::int64_t i = 0; i < geometry.num_local_experts; ++i) {
    const std::int32_t start = row;
    for (; next < kept.size() &&
           kept[next].expert == dest * geometry.num_local_experts + i;
         ++next) {
      row_of[kept[next].flat] = row++;
    }
    plan.group_rows[static_cast<std::size_t>(i)] = row - start;
    while ((row - start) % geometry.alignment != 0) ++row;
    plan.group_sizes[static_cast<std::size_t>(i)] = row - start;
  }
  // A map is in ascending order of its keys, which is (source rank, token, k).
  for (const auto& [flat, row_of_choice] : row_of) {
    const std::int64_t source = flat / geometry.choices_per_rank();
    const auto own = static_cast<std::size_t>(flat % geometry.choices_per_rank());
    plan.recv_choice.push_back(static_cast<std::int32_t>(flat));
    plan.recv_row.push_back(row_of_choice);
    ++plan.recv_counts[static_cast<std::size_t>(source)];
    RankPlan& sender = plans[static_cast<std::size_t>(source)];
    sender.send_rank[own] = static_cast<std::int32_t>(dest);
    sender.send_row[own] = row_of_choice;
    sender.kept[own] = 1;
  }
}

}  // namespace

std::string Geometry::Text() const {
  return "R=" + Show(num_ranks) + " L=" + Show(num_local_experts) +
         " T=" + Show(num_tokens) + " K=" + Show(num_topk) + " C=" + Show(capacity) +
         " alignment=" + Show(alignment) + " a node=" + Show(ranks_per_node);
}

std::vector<std::int32_t> RandomChoices(const Geometry& geometry, Routing routing,
                                        std::mt19937_64& rng) {
  const std::int64_t reachable =
      routing == Routing::kOneRankStarves
          ? geometry.num_experts() - geometry.num_local_experts
          : geometry.num_experts();
  const auto busiest = static_cast<std::int32_t>(
      rng() % static_cast<std::uint64_t>(geometry.num_experts()));
  std::vector<std::int32_t> experts(static_cast<std::size_t>(geometry.num_experts()));
  std::iota(experts.begin(), experts.end(), 0);
  std::vector<std::int32_t> choices;
  for (std::int64_t t = 0; t < geometry.num_ranks * geometry.num_tokens; ++t) {
    std::ranges::shuffle(experts, rng);
    for (std::int64_t k = 0; k < geometry.num_topk; ++k) {
      std::int32_t expert = kDropped;
      if (routing == Routing::kDistinct) {
        if (k < geometry.num_experts()) expert = experts[static_cast<std::size_t>(k)];
      } else if (routing == Routing::kOneExpert) {
        expert = busiest;
      } else if (routing != Routing::kNothing && reachable > 0) {
        const bool hole = routing == Routing::kHoles && rng() % 2 == 0;
        const auto any = rng() % static_cast<std::uint64_t>(reachable);
        if (!hole) expert = static_cast<std::int32_t>(any);
      }
      choices.push_back(expert);
    }
  }
  return choices;
}

std::int64_t LargestIncoming(const Geometry& geometry,
                             const std::vector<std::int32_t>& choices) {
  std::size_t largest = 0;
  for (std::int64_t dest = 0; dest < geometry.num_ranks; ++dest) {
    largest = std::max(largest, Incoming(geometry, choices, dest).size());
  }
  return static_cast<std::int64_t>(largest);
}

std::vector<RankPlan> ReferencePlans(const Geometry& geometry,
                                     const std::vector<std::int32_t>& choices) {
  std::vector<RankPlan> plans(static_cast<std::size_t>(geometry.num_ranks),
                              EmptyPlan(geometry));
  for (std::int64_t dest = 0; dest < geometry.num_ranks; ++dest) {
    Receive(geometry, KeptBy(geometry, choices, dest), dest, plans);
  }
  for (std::size_t i = 0; i < choices.size(); ++i) {
    if (choices[i] == kDropped) continue;
    const auto own = i % static_cast<std::size_t>(geometry.choices_per_rank());
    RankPlan& sender = plans[i / static_cast<std::size_t>(geometry.choices_per_rank())];
    if (sender.kept[own] == 0) ++sender.num_dropped;
    for (RankPlan& plan : plans)
      ++plan.expert_load[static_cast<std::size_t>(choices[i])];
  }
  return plans;
}

}  // namespace jax_ep
