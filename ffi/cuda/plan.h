// The GPU's kernels of `make_plan`, for the handlers; Python asks how much workspace
// they need.

#ifndef JAX_EP_FFI_CUDA_PLAN_H_
#define JAX_EP_FFI_CUDA_PLAN_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "common/plan.h"

namespace jax_ep::cuda {

// Whose plans are wanted: some ranks', each once, or all of them, in any order.
struct PlanRanks {
  const std::int32_t* ranks;  // [num_stacked], where the GPU reads them
  std::int64_t num_stacked;
};

// Words of int32 that MakePlans needs, for however many plans.
std::int64_t PlanWorkspace(const PlanArgs& args);

// Makes the plans of these ranks, whose outputs lie one behind the other from `first`
// on, in `workspace`. All ranks' choices are counted; beyond that the work is what
// these ranks send and receive. Nothing is decided by the order in which threads come.
cudaError_t MakePlans(const PlanArgs& args, const PlanArrays& first,
                      const PlanRanks& ranks, std::int32_t* workspace,
                      cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PLAN_H_
