// What the steps of plan.cc hand to each other.

#ifndef JAX_EP_FFI_CPU_PLAN_TABLES_H_
#define JAX_EP_FFI_CPU_PLAN_TABLES_H_

#include <cstdint>
#include <limits>
#include <vector>

#include "common/plan.h"

namespace jax_ep::cpu {

// A cutoff that no choice reaches.
inline constexpr std::int64_t kKeepAll = std::numeric_limits<std::int64_t>::max();

// A [rows, cols] table of counts.
class Counts {
 public:
  Counts(std::int64_t rows, std::int64_t cols)
      : cols_(cols), data_(static_cast<std::size_t>(rows * cols)) {}
  std::int32_t* row(std::int64_t i) { return data_.data() + i * cols_; }
  const std::int32_t* row(std::int64_t i) const { return data_.data() + i * cols_; }

 private:
  std::int64_t cols_;
  std::vector<std::int32_t> data_;
};

// Everything about an exchange that the plans of all its ranks share.
struct PlanTables {
  explicit PlanTables(const PlanArgs& args)
      : asked(args.num_ranks, args.num_experts),
        kept(args.num_ranks, args.num_experts),
        first_row(args.num_ranks, args.num_experts),
        first_entry(args.num_ranks, args.num_ranks),
        load(static_cast<std::size_t>(args.num_experts)),
        group_rows(static_cast<std::size_t>(args.num_experts)),
        cutoff(static_cast<std::size_t>(args.num_ranks), kKeepAll),
        rank_of(static_cast<std::size_t>(args.num_experts)) {}

  Counts asked;        // [source, expert] choices
  Counts kept;         // [source, expert] choices that fit
  Counts first_row;    // [source, expert] row of a source's first kept choice
  Counts first_entry;  // [destination, source] where a source starts in the recv list
  std::vector<std::int32_t> load;        // [expert] choices of all sources
  std::vector<std::int32_t> group_rows;  // [expert]
  std::vector<std::int64_t> cutoff;      // [rank] keeps choices of lower Priority
  std::vector<std::int32_t> rank_of;     // [expert]
  bool overflows = false;
};

// Position in the order (k, token, source rank).
inline std::int64_t Priority(const PlanArgs& args, std::int64_t k, std::int64_t token,
                             std::int64_t source) {
  return (k * args.num_tokens + token) * args.num_ranks + source;
}

// Choices that a rank keeps at most: what is left when each group pays the most
// padding.
inline std::int64_t PlanBudget(const PlanArgs& args) {
  return args.capacity - args.num_local_experts() * (args.alignment - 1);
}

inline std::int64_t RoundUp(std::int64_t rows, std::int64_t alignment) {
  return (rows + alignment - 1) / alignment * alignment;
}

// Whether rank `dest` keeps choice (source, token, k).
inline bool IsKept(const PlanArgs& args, const PlanTables& tables, std::int64_t dest,
                   std::int64_t k, std::int64_t token, std::int64_t source) {
  const std::int64_t cutoff = tables.cutoff[static_cast<std::size_t>(dest)];
  return cutoff == kKeepAll || Priority(args, k, token, source) < cutoff;
}

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_PLAN_TABLES_H_
