// Second kernel of a plan: finds where ranks that are asked for too much stop.

#include <cstdint>

#include "cuda/plan_cutoffs.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

constexpr int kCutoffWarps = 32;
constexpr int kCutoffThreads = kCutoffWarps * kWarpSize;

// A block per destination rank.
__global__ void __launch_bounds__(kCutoffThreads, 1)
    FindCutoffsKernel(PlanTables tables) {
  __shared__ WarpCounts counts;
  FindCutoffOf<kCutoffWarps>(tables, blockIdx.x, counts);
}

}  // namespace

cudaError_t FindCutoffs(const PlanTables& tables, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(tables.args.num_ranks));
  return Launch(FindCutoffsKernel, blocks, kCutoffThreads, stream, tables);
}

}  // namespace jax_ep::cuda
