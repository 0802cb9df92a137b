#include <cstdint>

#include "cuda/plan_tables.h"

namespace jax_ep {
namespace {

// A warp per tile.
__global__ void __launch_bounds__(kThreads) CountAskedKernel(PlanTables tables) {
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * kWarps + WarpInBlock();
  if (row >= tables.rows()) return;
  const auto all = [](std::int32_t, std::int64_t) { return true; };
  CountTile(tables, Tile(tables, row), all, tables.asked);
}

}  // namespace

cudaError_t CountAsked(const PlanTables& tables, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((tables.rows() + kWarps - 1) / kWarps));
  return Launch(CountAskedKernel, blocks, kThreads, stream, tables);
}

}  // namespace jax_ep
