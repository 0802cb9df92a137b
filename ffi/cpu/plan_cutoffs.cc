// The passes over all choices that only plans with too little room need.

#include "cpu/plan_cutoffs.h"

#include <cstdint>
#include <vector>

#include "common/dropped.h"

namespace jax_ep::cpu {
namespace {

// The rank that choice (source, token, k) goes to, or kDropped.
std::int32_t DestOf(const PlanArgs& args, const PlanTables& tables, std::int64_t source,
                    std::int64_t token, std::int64_t k) {
  const std::int32_t expert = args.ChoicesOf(source)[token * args.num_topk + k];
  return expert == kDropped ? kDropped
                            : tables.rank_of[static_cast<std::size_t>(expert)];
}

// Returns the first position at which the running sum of count(0), count(1), … exceeds
// the budget, and takes what stands before it off the budget.
template <typename Count>
std::int64_t SpendBudget(std::int64_t& budget, Count count) {
  std::int64_t i = 0;
  for (; count(i) <= budget; ++i) budget -= count(i);
  return i;
}

}  // namespace

void FindCutoffs(const PlanArgs& args, const ParallelFor& parallel_for,
                 const std::vector<bool>& too_much, PlanTables& tables) {
  Counts by_k(args.num_ranks, args.num_ranks * args.num_topk);  // [source, (dest, k)]
  parallel_for(args.num_ranks, [&](std::int64_t s) {
    for (std::int64_t t = 0; t < args.num_tokens; ++t) {
      for (std::int64_t k = 0; k < args.num_topk; ++k) {
        const std::int32_t dest = DestOf(args, tables, s, t, k);
        if (dest != kDropped) ++by_k.row(s)[dest * args.num_topk + k];
      }
    }
  });
  const auto num_ranks = static_cast<std::size_t>(args.num_ranks);
  std::vector<std::int64_t> budget(num_ranks, PlanBudget(args));
  std::vector<std::int64_t> last_k(num_ranks, -1);
  for (std::size_t d = 0; d < num_ranks; ++d) {
    if (!too_much[d]) continue;
    last_k[d] = SpendBudget(budget[d], [&](std::int64_t k) {
      std::int64_t count = 0;
      const std::int64_t column = static_cast<std::int64_t>(d) * args.num_topk + k;
      for (std::int64_t s = 0; s < args.num_ranks; ++s) count += by_k.row(s)[column];
      return count;
    });
  }
  Counts by_token(args.num_tokens, args.num_ranks);  // [token, dest], at last_k[dest]
  parallel_for(args.num_tokens, [&](std::int64_t t) {
    for (std::int64_t s = 0; s < args.num_ranks; ++s) {
      for (std::int64_t k = 0; k < args.num_topk; ++k) {
        const std::int32_t dest = DestOf(args, tables, s, t, k);
        if (dest != kDropped && last_k[static_cast<std::size_t>(dest)] == k) {
          ++by_token.row(t)[dest];
        }
      }
    }
  });
  for (std::size_t d = 0; d < num_ranks; ++d) {
    if (!too_much[d]) continue;
    const auto dest = static_cast<std::int64_t>(d);
    const std::int64_t token =
        SpendBudget(budget[d], [&](std::int64_t t) { return by_token.row(t)[dest]; });
    const std::int64_t source = SpendBudget(budget[d], [&](std::int64_t s) {
      return DestOf(args, tables, s, token, last_k[d]) == dest ? 1 : 0;
    });
    tables.cutoff[d] = Priority(args, last_k[d], token, source);
  }
}

}  // namespace jax_ep::cpu
