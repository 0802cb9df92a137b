// One rank's part of plans that no rank makes alone, against its part of the
// reference's.
#include "cpu/own_choices.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "common/dropped.h"
#include "plan_reference.h"

namespace jax_ep {
namespace {

constexpr std::int32_t kKeepAll = std::numeric_limits<std::int32_t>::max();

std::size_t Size(std::int64_t n) { return static_cast<std::size_t>(n); }

// What owners tell the sources, as it follows from the plans of all.
struct Decisions {
  Decisions(const Geometry& geometry, const std::vector<std::int32_t>& choices,
            const std::vector<RankPlan>& plans)
      : cutoffs(Size(geometry.num_ranks), kKeepAll),
        first_rows(Size(geometry.num_ranks),
                   std::vector<std::int32_t>(Size(geometry.num_experts()), 0)) {
    for (std::int64_t s = 0; s < geometry.num_ranks; ++s) {
      const RankPlan& plan = plans[Size(s)];
      std::vector<std::int32_t>& first = first_rows[Size(s)];
      std::ranges::fill(first, kKeepAll);
      for (std::int64_t i = 0; i < geometry.choices_per_rank(); ++i) {
        const std::int32_t expert = choices[Size(s * geometry.choices_per_rank() + i)];
        if (expert == kDropped) continue;
        if (plan.kept[Size(i)] != 0) {
          first[Size(expert)] = std::min(first[Size(expert)], plan.send_row[Size(i)]);
          continue;
        }
        const std::int64_t k = i % geometry.num_topk;
        const std::int64_t t = i / geometry.num_topk;
        const std::int64_t priority =
            (k * geometry.num_tokens + t) * geometry.num_ranks + s;
        std::int32_t& cutoff = cutoffs[Size(expert / geometry.num_local_experts)];
        cutoff = std::min(cutoff, static_cast<std::int32_t>(priority));
      }
    }
  }

  std::vector<std::int32_t> cutoffs;
  std::vector<std::vector<std::int32_t>> first_rows;  // by source
};

void CheckCounts(const cpu::OwnChoices& own, const RankPlan& plan) {
  std::vector<std::int32_t> kept(Size(own.num_experts), 7);
  std::vector<std::int32_t> asked(Size(own.num_ranks * own.num_topk), 7);
  std::vector<std::int32_t> want_kept(kept.size());
  std::vector<std::int32_t> want_asked(asked.size());
  const std::int64_t num_local = own.num_experts / own.num_ranks;
  for (std::int64_t i = 0; i < own.num_tokens * own.num_topk; ++i) {
    const std::int32_t expert = own.topk_idx[i];
    if (expert == kDropped) continue;
    want_kept[Size(expert)] += plan.kept[Size(i)];
    ++want_asked[Size(expert / num_local * own.num_topk + i % own.num_topk)];
  }
  std::uint32_t print = 0;
  cpu::CountChoices(own, {kept.data(), asked.data(), &print});
  EP_CHECK(kept == want_kept);
  EP_CHECK(asked == want_asked);
}

void CheckPlaces(const cpu::OwnChoices& own,
                 const std::vector<std::int32_t>& first_rows, const RankPlan& plan) {
  const std::size_t count = Size(own.num_tokens * own.num_topk);
  const std::unique_ptr<bool[]> kept(new bool[count]);
  std::vector<std::int32_t> rank(count, 7);
  std::vector<std::int32_t> row(count, 7);
  std::vector<std::int32_t> place(count, 7);
  std::int32_t dropped = 7;
  cpu::PlaceChoices(own, first_rows.data(),
                    {kept.get(), rank.data(), row.data(), place.data(), &dropped});
  std::vector<std::int32_t> next(Size(own.num_ranks));
  for (std::size_t i = 0; i < count; ++i) {
    EP_CHECK_EQ(kept[i], plan.kept[i] != 0);
    const std::int32_t want = kept[i] ? next[Size(rank[i])]++ : kDropped;
    EP_CHECK_EQ(place[i], want);
  }
  EP_CHECK(rank == plan.send_rank);
  EP_CHECK(row == plan.send_row);
  EP_CHECK_EQ(dropped, plan.num_dropped);
}

void CheckAll(const Geometry& geometry, std::mt19937_64& rng) {
  for (const Routing routing : kAllRoutings) {
    const Case which(geometry.Text());
    const std::vector<std::int32_t> choices = RandomChoices(geometry, routing, rng);
    const std::vector<RankPlan> plans = ReferencePlans(geometry, choices);
    const Decisions decisions(geometry, choices, plans);
    for (std::int64_t s = 0; s < geometry.num_ranks; ++s) {
      const std::vector<std::int32_t> mine(
          choices.begin() + s * geometry.choices_per_rank(),
          choices.begin() + (s + 1) * geometry.choices_per_rank());
      const cpu::OwnChoices own = {.topk_idx = mine.data(),
                                   .cutoffs = decisions.cutoffs.data(),
                                   .rank = s,
                                   .num_ranks = geometry.num_ranks,
                                   .num_tokens = geometry.num_tokens,
                                   .num_topk = geometry.num_topk,
                                   .num_experts = geometry.num_experts()};
      CheckCounts(own, plans[Size(s)]);
      CheckPlaces(own, decisions.first_rows[Size(s)], plans[Size(s)]);
    }
  }
}

EP_TEST(CountsAndPlacesAsTheReference) {
  std::mt19937_64 rng(1);
  for (const std::int64_t capacity : {1, 9, 30, 200}) {
    CheckAll({.num_ranks = 4,
              .num_local_experts = 3,
              .num_tokens = 13,
              .num_topk = 4,
              .capacity = capacity},
             rng);
  }
  CheckAll({.num_ranks = 1, .num_tokens = 3, .num_topk = 2, .capacity = 4}, rng);
  CheckAll({.num_ranks = 2, .num_tokens = 0, .num_topk = 2}, rng);
}

EP_TEST(FingerprintsTellChoicesApart) {
  std::vector<std::int32_t> choices = {0, 1, 2, kDropped};
  const std::int32_t cutoffs[] = {kKeepAll, kKeepAll};
  const auto print = [&](std::int64_t rank) {
    std::int32_t kept[4];
    std::int32_t asked[4];
    std::uint32_t fingerprint = 0;
    cpu::CountChoices({.topk_idx = choices.data(),
                       .cutoffs = cutoffs,
                       .rank = rank,
                       .num_ranks = 2,
                       .num_tokens = 2,
                       .num_topk = 2,
                       .num_experts = 4},
                      {kept, asked, &fingerprint});
    return fingerprint;
  };
  const std::uint32_t before = print(0);
  EP_CHECK(before != print(1));
  std::swap(choices[0], choices[1]);
  EP_CHECK(before != print(0));
}

}  // namespace
}  // namespace jax_ep
