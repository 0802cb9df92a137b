#ifndef JAX_EP_FFI_COMMON_PLAN_H_
#define JAX_EP_FFI_COMMON_PLAN_H_

#include <cstdint>

namespace jax_ep {

// In place of an expert or a row: there is none.
inline constexpr std::int32_t kDropped = -1;

// Computes the plans of `num_plans` ranks from the choices of all ranks. Every output
// has one slice per planned rank; R ranks, T tokens, K choices, E experts, L = E / R.
struct PlanArgs {
  const std::int32_t* topk_idx;  // [R, T, K], each in [0, E) or kDropped
  const std::int32_t* ranks;     // [num_plans], ascending: which ranks to plan for
  std::int64_t num_plans;
  std::int64_t num_ranks;
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t num_experts;
  std::int64_t capacity;
  std::int64_t alignment;

  std::int32_t* group_sizes;  // [num_plans, L]
  bool* kept;                 // [num_plans, T, K]
  std::int32_t* expert_load;  // [num_plans, E]
  std::int32_t* recv_counts;  // [num_plans, R]
  std::int32_t* num_dropped;  // [num_plans]
  std::int32_t* send_row;     // [num_plans, T, K], row on the expert's rank or kDropped
  std::int32_t* recv_choice;  // [num_plans, capacity], by (source rank, token, k)
  std::int32_t* recv_row;     // [num_plans, capacity], the row of each recv_choice
  std::int32_t* group_rows;   // [num_plans, L], group_sizes less the padding
  std::uint32_t* fingerprint;  // [num_plans], equal on all ranks

  std::int64_t num_local_experts() const { return num_experts / num_ranks; }
  std::int64_t choices_per_rank() const { return num_tokens * num_topk; }
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_PLAN_H_
