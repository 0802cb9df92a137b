// A step of plan.cc.

#ifndef JAX_EP_FFI_CPU_PLAN_CUTOFFS_H_
#define JAX_EP_FFI_CPU_PLAN_CUTOFFS_H_

#include <vector>

#include "common/plan.h"
#include "cpu/plan.h"
#include "cpu/plan_tables.h"

namespace jax_ep::cpu {

// Finds where each rank of which too much is asked stops keeping choices: first its k,
// then its token, then its source rank. Each step is one pass over all choices, for all
// such ranks together.
void FindCutoffs(const PlanArgs& args, const ParallelFor& parallel_for,
                 const std::vector<bool>& too_much, PlanTables& tables);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_PLAN_CUTOFFS_H_
