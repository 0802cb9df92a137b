// Counting where choices go: what the first kernels of a plan do for a tile.

#ifndef JAX_EP_FFI_CUDA_PLAN_COUNT_H_
#define JAX_EP_FFI_CUDA_PLAN_COUNT_H_

#include <cstdint>

#include "common/dropped.h"
#include "common/plan_bounds.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {

// Notes which outputs are whose, and sets what others add to. By a block.
__device__ inline void FindOutputs(const PlanTables& tables) {
  for (std::int64_t r = threadIdx.x; r < tables.args.num_ranks; r += blockDim.x) {
    tables.output_of[r] = kDropped;
  }
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < tables.ranks.num_stacked; i += blockDim.x) {
    const PlanArrays plan = tables.args.OfStacked(tables.first, i);
    *plan.num_dropped = 0;
    // Only ranks that might mix up two calls compare these.
    *plan.fingerprint = 0;
    const std::int32_t rank = tables.ranks.ranks[i];
    if (!IsIndex(rank, tables.args.num_ranks)) continue;
    tables.output_of[rank] = static_cast<std::int32_t>(i);
  }
}

// Counts the tile's choices that `is_kept(expert, i)` by expert and by destination.
template <typename Shared, typename IsKept>
__device__ void CountTile(const PlanTables& tables, const Tile& tile, Shared& shared,
                          IsKept is_kept, std::int32_t* counts) {
  const auto local = static_cast<std::int32_t>(tables.args.num_local_experts());
  WithCounters(tables, tile.row, shared, [&](std::int32_t* counters) {
    for (int c = Lane(); c < tables.columns; c += kWarpSize) counters[c] = 0;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kChoicesPerLane; ++j) {
      const std::int32_t expert = tile.experts[j];
      if (expert == kDropped || !is_kept(expert, tile.Choice(j))) continue;
      // Numbers are added up: in which order does not show.
      atomicAdd(counters + expert, 1);
      atomicAdd(counters + tables.DestColumn(expert / local), 1);
    }
    __syncwarp();
    for (int c = Lane(); c < tables.columns; c += kWarpSize) {
      counts[tile.row * tables.columns + c] = counters[c];
    }
  });
}

// Files where the tile's choices go by their priority, for ranks that overflow.
__device__ inline void FileDests(const PlanTables& tables, const Tile& tile) {
  const auto local = static_cast<std::int32_t>(tables.args.num_local_experts());
#pragma unroll
  for (int j = 0; j < kChoicesPerLane; ++j) {
    const std::int32_t i = tile.Choice(j);
    if (i >= tile.end) continue;
    const std::int32_t expert = tile.experts[j];
    tables.dest_by_priority[tables.Priority(tile.source, i)] =
        expert == kDropped ? kNowhere : static_cast<std::uint16_t>(expert / local);
  }
}

// Counts where the tile's choices want to go.
template <typename Shared>
__device__ void CountAskedOf(const PlanTables& tables, std::int64_t row,
                             Shared& shared) {
  const Tile tile(tables, row);
  const auto all = [](std::int32_t, std::int32_t) { return true; };
  CountTile(tables, tile, shared, all, tables.asked);
  if (tables.MayOverflow()) FileDests(tables, tile);
}

// Counts those that find room, once the cutoffs are known.
template <typename Shared>
__device__ void CountKeptOf(const PlanTables& tables, std::int64_t row,
                            Shared& shared) {
  const Tile tile(tables, row);
  const auto local = static_cast<std::int32_t>(tables.args.num_local_experts());
  const auto is_kept = [&](std::int32_t expert, std::int32_t i) {
    return tables.IsKept(tables.Priority(tile.source, i), expert / local);
  };
  CountTile(tables, tile, shared, is_kept, tables.placed);
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PLAN_COUNT_H_
