// The arrays of one rank's plan, as they travel: the plan's handler returns them, and
// every other handler is given them first.
#ifndef JAX_EP_FFI_COMMON_PLAN_ARRAYS_H_
#define JAX_EP_FFI_COMMON_PLAN_ARRAYS_H_

#include <cstdint>

#include "common/plan.h"

namespace jax_ep {

// What the sizes of a plan's arrays follow from.
struct PlanSizes {
  std::int64_t num_ranks;
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t num_experts;
  std::int64_t capacity;

  std::int64_t num_local_experts() const { return num_experts / num_ranks; }
};

// Calls visit(name, array, elements) for each array of a plan, in the order of travel,
// that of Python's PlanArrays.
template <typename Visit>
void VisitPlanArrays(PlanArrays& plan, const PlanSizes& sizes, Visit visit) {
  const std::int64_t choices = sizes.num_tokens * sizes.num_topk;
  visit("group_sizes", plan.group_sizes, sizes.num_local_experts());
  visit("kept", plan.kept, choices);
  visit("expert_load", plan.expert_load, sizes.num_experts);
  visit("recv_counts", plan.recv_counts, sizes.num_ranks);
  visit("num_dropped", plan.num_dropped, std::int64_t{1});
  visit("send_rank", plan.send_rank, choices);
  visit("send_row", plan.send_row, choices);
  visit("recv_choice", plan.recv_choice, sizes.capacity);
  visit("recv_row", plan.recv_row, sizes.capacity);
  visit("group_rows", plan.group_rows, sizes.num_local_experts());
  visit("fingerprint", plan.fingerprint, std::int64_t{1});
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_PLAN_ARRAYS_H_
