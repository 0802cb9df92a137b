// A plan as the contract words it, for tests to compare with.

#ifndef JAX_EP_TESTS_NATIVE_PLAN_REFERENCE_H_
#define JAX_EP_TESTS_NATIVE_PLAN_REFERENCE_H_

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace jax_ep {

struct Geometry {
  std::int64_t num_ranks = 1;
  std::int64_t num_local_experts = 1;
  std::int64_t num_tokens = 1;
  std::int64_t num_topk = 1;
  std::int64_t capacity = 1;
  std::int64_t alignment = 1;
  std::int64_t ranks_per_node = 1;

  std::int64_t num_experts() const { return num_ranks * num_local_experts; }
  std::int64_t choices_per_rank() const { return num_tokens * num_topk; }
  // Rows that hold `choices` of one rank whatever the padding.
  std::int64_t CapacityFor(std::int64_t choices) const {
    return choices + num_local_experts * (alignment - 1);
  }
  std::string Text() const;
};

enum class Routing {
  kUniform,         // with duplicates within a token
  kDistinct,        // no expert twice in a token
  kHoles,           // half of the choices dropped
  kOneExpert,       // all to one expert
  kOneRankStarves,  // the last rank receives nothing
  kNothing,         // all choices dropped
};

inline constexpr Routing kAllRoutings[] = {
    Routing::kUniform,   Routing::kDistinct,       Routing::kHoles,
    Routing::kOneExpert, Routing::kOneRankStarves, Routing::kNothing};

// Returns the choices of all ranks, [num_ranks, num_tokens, num_topk].
std::vector<std::int32_t> RandomChoices(const Geometry& geometry, Routing routing,
                                        std::mt19937_64& rng);

// Returns how many choices the busiest rank is asked to take.
std::int64_t LargestIncoming(const Geometry& geometry,
                             const std::vector<std::int32_t>& choices);

// One rank's slices of the outputs in PlanArgs, the receive list cut to what is used.
struct RankPlan {
  std::vector<std::int32_t> group_sizes;
  std::vector<std::int32_t> kept;
  std::vector<std::int32_t> expert_load;
  std::vector<std::int32_t> recv_counts;
  std::int32_t num_dropped = 0;
  std::vector<std::int32_t> send_rank;
  std::vector<std::int32_t> send_row;
  std::vector<std::int32_t> recv_choice;
  std::vector<std::int32_t> recv_row;
  std::vector<std::int32_t> group_rows;
};

// Returns the plans of all ranks, made the long way: for each rank sort what comes in
// by priority, cut, sort what is left by row order, and number it.
std::vector<RankPlan> ReferencePlans(const Geometry& geometry,
                                     const std::vector<std::int32_t>& choices);

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_PLAN_REFERENCE_H_
