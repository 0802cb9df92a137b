// The GPU's kernels of `make_plan`, for the handlers; Python asks how much workspace
// they need.

#ifndef JAX_EP_FFI_CUDA_PLAN_H_
#define JAX_EP_FFI_CUDA_PLAN_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "common/plan.h"

namespace jax_ep::cuda {

// Words of int32 that MakePlans needs for so many stacked ranks.
std::int64_t PlanWorkspace(const PlanArgs& args);

// Makes the plans of all stacked ranks, whose outputs lie behind the first one's, in
// `workspace`. Nothing is decided by the order in which threads come.
cudaError_t MakePlans(const PlanArgs& args, const PlanArrays& first,
                      std::int32_t* workspace, cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PLAN_H_
