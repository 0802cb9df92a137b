// Implements own_choices.h.
#include "cpu/own_choices.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/dropped.h"
#include "cpu/choice_print.h"

namespace jax_ep::cpu {
namespace {

std::vector<std::int32_t> RanksOfExperts(const OwnChoices& choices) {
  std::vector<std::int32_t> ranks(static_cast<std::size_t>(choices.num_experts));
  const std::int64_t num_local = choices.num_experts / choices.num_ranks;
  for (std::int64_t e = 0; e < choices.num_experts; ++e) {
    ranks[static_cast<std::size_t>(e)] = static_cast<std::int32_t>(e / num_local);
  }
  return ranks;
}

// Calls visit(i, k, expert, rank, kept) for each choice that names an expert.
template <typename Visit>
void VisitRouted(const OwnChoices& choices, Visit visit) {
  const std::vector<std::int32_t> ranks = RanksOfExperts(choices);
  for (std::int64_t t = 0; t < choices.num_tokens; ++t) {
    for (std::int64_t k = 0; k < choices.num_topk; ++k) {
      const std::int64_t i = t * choices.num_topk + k;
      const std::int32_t expert = choices.topk_idx[i];
      if (expert == kDropped) continue;
      const std::int32_t rank = ranks[static_cast<std::size_t>(expert)];
      const std::int64_t priority =
          (k * choices.num_tokens + t) * choices.num_ranks + choices.rank;
      visit(i, k, expert, rank, priority < choices.cutoffs[rank]);
    }
  }
}

}  // namespace

void CountChoices(const OwnChoices& choices, const ChoiceCounts& counts) {
  std::fill_n(counts.kept, choices.num_experts, 0);
  std::fill_n(counts.asked_by_k, choices.num_ranks * choices.num_topk, 0);
  VisitRouted(choices, [&](std::int64_t, std::int64_t k, std::int32_t expert,
                           std::int32_t rank, bool kept) {
    ++counts.asked_by_k[rank * choices.num_topk + k];
    if (kept) ++counts.kept[expert];
  });
  const std::int64_t count = choices.num_tokens * choices.num_topk;
  const std::uint64_t print =
      PrintOfChoices(choices.topk_idx, count, choices.rank * count);
  *counts.fingerprint =
      static_cast<std::uint32_t>((print * 0xbf58476d1ce4e5b9ULL) >> 32);
}

void PlaceChoices(const OwnChoices& choices, const std::int32_t* first_rows,
                  const PlacedChoices& placed) {
  const std::int64_t count = choices.num_tokens * choices.num_topk;
  std::vector<std::int32_t> next_row(first_rows, first_rows + choices.num_experts);
  std::vector<std::int32_t> next_place(static_cast<std::size_t>(choices.num_ranks));
  std::fill_n(placed.kept, count, false);
  for (std::int32_t* list : {placed.send_rank, placed.send_row, placed.place}) {
    std::fill_n(list, count, kDropped);
  }
  std::int32_t dropped = 0;
  VisitRouted(choices, [&](std::int64_t i, std::int64_t, std::int32_t expert,
                           std::int32_t rank, bool kept) {
    placed.kept[i] = kept;
    dropped += kept ? 0 : 1;
    if (!kept) return;
    placed.send_rank[i] = rank;
    placed.send_row[i] = next_row[static_cast<std::size_t>(expert)]++;
    placed.place[i] = next_place[static_cast<std::size_t>(rank)]++;
  });
  *placed.num_dropped = dropped;
}

}  // namespace jax_ep::cpu
