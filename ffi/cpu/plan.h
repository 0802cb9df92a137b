// The CPU's kernel of `make_plan`, for the handlers.

#ifndef JAX_EP_FFI_CPU_PLAN_H_
#define JAX_EP_FFI_CPU_PLAN_H_

#include <cstdint>
#include <functional>

#include "common/plan.h"

namespace jax_ep::cpu {

// Runs body(0) … body(count - 1), on any threads in any order; returns when all ended.
using ParallelFor = std::function<void(std::int64_t count,
                                       const std::function<void(std::int64_t)>& body)>;

// Fills in the plans: a counting sort of all choices by (expert, source rank, token, k)
// after those beyond a rank's capacity are cut off in the order (k, token, source
// rank). Costs O(R * (T * K + E)) for one plan or for all.
void RunPlan(const PlanArgs& args, const ParallelFor& parallel_for);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_PLAN_H_
