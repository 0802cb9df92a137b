// What Python asks of the library for GPUs besides the handlers.
#include <cuda_runtime.h>

#include <cstdint>

#include "bind/cuda/launch_thread.h"
#include "bind/process/process.h"
#include "bind/process/tell.h"
#include "common/plan.h"
#include "cuda/peers.h"
#include "cuda/plan.h"
#include "cuda/reduce_rows.h"
#include "fabric/gpus/cuda_says.h"
#include "fabric/gpus/shared_memory.h"

bool jax_ep::LaunchesInOrder() { return kLaunchesInOrder; }

namespace {

int Succeeded(cudaError_t error, char* problem, int problem_bytes) {
  if (error == cudaSuccess) return 1;
  jax_ep::Tell(jax_ep::CudaSays(error), problem, problem_bytes);
  return 0;
}

}  // namespace

// What Python asks of the library besides the handlers, by ctypes.
extern "C" {

int jax_ep_cuda_version() { return CUDART_VERSION; }

std::int64_t jax_ep_max_peers() { return jax_ep::cuda::kMaxPeers; }

// Lets these devices read each other's memory, and looks for two of which the first
// cannot read the second's; returns whether there are such, and which.
int jax_ep_strangers(const std::int32_t* devices, std::int32_t count,
                     std::int32_t* strangers) {
  for (std::int32_t i = 0; i < count; ++i) {
    for (std::int32_t j = 0; j < count; ++j) {
      if (i == j || jax_ep::ReachPeer(devices[i], devices[j]) == cudaSuccess) continue;
      strangers[0] = devices[i];
      strangers[1] = devices[j];
      return 1;
    }
  }
  return 0;
}

// Writes into `handle`, of 64 bytes, where other processes find some memory of a
// device; returns whether they can, or writes into `problem` why not.
int jax_ep_offer_memory(std::int32_t device, void* handle, char* problem,
                        int problem_bytes) {
  return Succeeded(jax_ep::OfferMemory(device, handle), problem, problem_bytes);
}

// Has a device read memory that another process offers; returns whether it could, or
// writes into `problem` why not.
int jax_ep_try_memory(std::int32_t device, const void* handle, char* problem,
                      int problem_bytes) {
  return Succeeded(jax_ep::TryMemory(device, handle), problem, problem_bytes);
}

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
