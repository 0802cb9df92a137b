// First kernel of a plan: counts where the choices want to go.

#include <cstdint>

#include "common/dropped.h"
#include "common/plan_bounds.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

// Files where the tile's choices go by their priority, for ranks that overflow.
__device__ void FileDests(const PlanTables& tables, const Tile& tile) {
  const auto local = static_cast<std::int32_t>(tables.args.num_local_experts());
#pragma unroll
  for (int j = 0; j < kChoicesPerLane; ++j) {
    const std::int64_t i = tile.Choice(j);
    if (i >= tile.end) continue;
    const std::int32_t expert = tile.experts[j];
    tables.dest_by_priority[tables.Priority(tile.source, i)] =
        expert == kDropped ? kNowhere : static_cast<std::uint16_t>(expert / local);
  }
}

// Notes which outputs are whose, by a block.
__device__ void FindOutputs(const PlanTables& tables) {
  for (std::int64_t r = threadIdx.x; r < tables.args.num_ranks; r += blockDim.x) {
    tables.output_of[r] = kDropped;
  }
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < tables.ranks.num_stacked; i += blockDim.x) {
    const std::int32_t rank = tables.ranks.ranks[i];
    if (!IsIndex(rank, tables.args.num_ranks)) continue;
    tables.output_of[rank] = static_cast<std::int32_t>(i);
  }
}

// A warp per tile.
__global__ void __launch_bounds__(kThreads)
    CountAskedKernel(const __grid_constant__ TablesWithChoices with_choices) {
  const PlanTables tables = with_choices.Bound();
  if (blockIdx.x == 0) FindOutputs(tables);
  const std::int64_t row = TileRow();
  if (row >= tables.rows()) return;
  const Tile tile(tables, row);
  const auto all = [](std::int32_t, std::int64_t) { return true; };
  CountTile(tables, tile, all, tables.asked);
  FileDests(tables, tile);
}

}  // namespace

cudaError_t CountAsked(const PlanTables& tables, cudaStream_t stream) {
  return LaunchOnTiles(CountAskedKernel, tables, stream);
}

}  // namespace jax_ep::cuda
