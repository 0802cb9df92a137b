// Fourth kernel of a plan: turns counts into where things start, and writes what is
// known before any choice is placed.

#include <cstdint>

#include "cuda/plan_layout.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

// A block per part.
__global__ void __launch_bounds__(kLayOutThreads, 1) LayOutKernel(PlanTables tables) {
  __shared__ ColumnSums sums;
  LayOutPart<kLayOutWarps>(tables, blockIdx.x, &sums);
}

}  // namespace

cudaError_t LayOut(const PlanTables& tables, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(LayOutParts(tables)));
  return Launch(LayOutKernel, blocks, kLayOutThreads, stream, tables);
}

}  // namespace jax_ep::cuda
