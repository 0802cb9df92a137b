// Makes the plans of all ranks in passes over their choices. Two of these have files
// of their own: plan_cutoffs.cc and plan_placement.h.

#include "cpu/plan.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/dropped.h"
#include "cpu/choice_print.h"
#include "cpu/plan_cutoffs.h"
#include "cpu/plan_placement.h"
#include "cpu/plan_tables.h"

namespace jax_ep::cpu {
namespace {

void CountAsked(const PlanArgs& args, std::int64_t source, PlanTables& tables) {
  std::int32_t* asked = tables.asked.row(source);
  const std::int32_t* choices = args.ChoicesOf(source);
  for (std::int64_t i = 0; i < args.choices_per_rank(); ++i) {
    if (choices[i] != kDropped) ++asked[choices[i]];
  }
}

// Adds up what all sources ask of rank `dest`.
void SumLoad(const PlanArgs& args, std::int64_t dest, PlanTables& tables) {
  const std::int64_t num_local = args.num_local_experts();
  std::int32_t* load = tables.load.data() + dest * num_local;
  for (std::int64_t s = 0; s < args.num_ranks; ++s) {
    const std::int32_t* asked = tables.asked.row(s) + dest * num_local;
    for (std::int64_t i = 0; i < num_local; ++i) load[i] += asked[i];
  }
}

// Finds out which ranks are asked for more than they hold.
std::vector<bool> FindOverflows(const PlanArgs& args, const PlanTables& tables) {
  const std::int64_t num_local = args.num_local_experts();
  std::vector<bool> too_much;
  for (std::int64_t dest = 0; dest < args.num_ranks; ++dest) {
    const std::int32_t* load = tables.load.data() + dest * num_local;
    const std::int64_t incoming =
        std::accumulate(load, load + num_local, std::int64_t{0});
    too_much.push_back(incoming > PlanBudget(args));
  }
  return too_much;
}

void CountKept(const PlanArgs& args, std::int64_t source, PlanTables& tables) {
  std::int32_t* kept = tables.kept.row(source);
  const std::int32_t* choices = args.ChoicesOf(source);
  if (!tables.overflows) {
    std::copy_n(tables.asked.row(source), args.num_experts, kept);
    return;
  }
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    for (std::int64_t k = 0; k < args.num_topk; ++k) {
      const std::int32_t expert = choices[t * args.num_topk + k];
      if (expert == kDropped) continue;
      const std::int32_t dest = tables.rank_of[static_cast<std::size_t>(expert)];
      if (IsKept(args, tables, dest, k, t, source)) ++kept[expert];
    }
  }
}

// Lays out rank `dest`: where each group starts and, within it, each source's rows; and
// where each source's entries start in the receive list.
void LayOut(const PlanArgs& args, std::int64_t dest, PlanTables& tables) {
  const std::int64_t first = dest * args.num_local_experts();
  std::int32_t* entries = tables.first_entry.row(dest);
  std::int64_t start = 0;
  for (std::int64_t e = first; e < first + args.num_local_experts(); ++e) {
    std::int64_t row = start;
    for (std::int64_t s = 0; s < args.num_ranks; ++s) {
      tables.first_row.row(s)[e] = static_cast<std::int32_t>(row);
      row += tables.kept.row(s)[e];
      entries[s] += tables.kept.row(s)[e];
    }
    tables.group_rows[static_cast<std::size_t>(e)] =
        static_cast<std::int32_t>(row - start);
    start += RoundUp(row - start, args.alignment);
  }
  std::int32_t sum = 0;
  for (std::int64_t s = 0; s < args.num_ranks; ++s) {
    sum += entries[s];
    entries[s] = sum - entries[s];
  }
}

// A number that two calls with different choices or geometry hardly ever share.
std::uint32_t Fingerprint(const PlanArgs& args) {
  std::uint64_t sum = 0;
  for (std::int64_t s = 0; s < args.num_ranks; ++s) {
    sum += PrintOfChoices(args.ChoicesOf(s), args.choices_per_rank(),
                          s * args.choices_per_rank());
  }
  sum ^= static_cast<std::uint64_t>(args.capacity) * 0xff51afd7ed558ccdULL;
  sum ^= static_cast<std::uint64_t>(args.alignment) * 0xc4ceb9fe1a85ec53ULL;
  sum ^= sum >> 29;
  return static_cast<std::uint32_t>((sum * 0xbf58476d1ce4e5b9ULL) >> 32);
}

void Summarize(const PlanArgs& args, const PlanTables& tables, std::uint32_t print,
               std::int64_t rank) {
  const PlanArrays* plan = args.OutputsOf(rank);
  if (plan == nullptr) return;
  const std::int64_t num_local = args.num_local_experts();
  const std::int64_t first = rank * num_local;
  std::ranges::copy(tables.load, plan->expert_load);
  for (std::int64_t s = 0; s < args.num_ranks; ++s) {
    const std::int32_t* kept = tables.kept.row(s) + first;
    std::int32_t received = 0;
    for (std::int64_t i = 0; i < num_local; ++i) received += kept[i];
    plan->recv_counts[s] = received;
  }
  for (std::int64_t i = 0; i < num_local; ++i) {
    const std::int32_t rows = tables.group_rows[static_cast<std::size_t>(first + i)];
    plan->group_rows[i] = rows;
    plan->group_sizes[i] = static_cast<std::int32_t>(RoundUp(rows, args.alignment));
  }
  *plan->fingerprint = print;
}

}  // namespace

void RunPlan(const PlanArgs& args, const ParallelFor& parallel_for) {
  PlanTables tables(args);
  for (std::int64_t e = 0; e < args.num_experts; ++e) {
    tables.rank_of[static_cast<std::size_t>(e)] =
        static_cast<std::int32_t>(e / args.num_local_experts());
  }
  parallel_for(args.num_ranks,
               [&](std::int64_t source) { CountAsked(args, source, tables); });
  parallel_for(args.num_ranks, [&](std::int64_t dest) { SumLoad(args, dest, tables); });
  const std::vector<bool> too_much = FindOverflows(args, tables);
  tables.overflows = std::ranges::find(too_much, true) != too_much.end();
  if (tables.overflows) FindCutoffs(args, parallel_for, too_much, tables);
  parallel_for(args.num_ranks,
               [&](std::int64_t source) { CountKept(args, source, tables); });
  parallel_for(args.num_ranks, [&](std::int64_t dest) { LayOut(args, dest, tables); });
  parallel_for(args.num_ranks,
               [&](std::int64_t source) { Placement(args, tables, source).Run(); });
  const std::uint32_t print = Fingerprint(args);
  parallel_for(args.num_ranks,
               [&](std::int64_t rank) { Summarize(args, tables, print, rank); });
}

}  // namespace jax_ep::cpu
