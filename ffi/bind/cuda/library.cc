// What Python asks of the library for GPUs besides the handlers.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/plan.h"
#include "cuda/plan.h"
#include "cuda/reduce_rows.h"
#include "xla/ffi/api/ffi.h"

// What Python asks of the library besides the handlers, by ctypes.
extern "C" {

int jax_ep_ffi_minor_version() { return XLA_FFI_API_MINOR; }

int jax_ep_cuda_version() { return CUDART_VERSION; }

std::int64_t jax_ep_max_topk() { return jax_ep::cuda::kMaxTopk; }

// Words of int32 that the plan's handler wants as its last result.
std::int64_t jax_ep_plan_workspace(std::int64_t num_ranks, std::int64_t num_tokens,
                                   std::int64_t num_topk, std::int64_t num_experts) {
  jax_ep::PlanArgs args = {};
  args.num_ranks = num_ranks;
  args.num_tokens = num_tokens;
  args.num_topk = num_topk;
  args.num_experts = num_experts;
  return jax_ep::cuda::PlanWorkspace(args);
}

}  // extern "C"
