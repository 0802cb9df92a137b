// Placing choices: what the last kernel of a plan does for a tile.

#ifndef JAX_EP_FFI_CUDA_PLAN_PLACEMENT_H_
#define JAX_EP_FFI_CUDA_PLAN_PLACEMENT_H_

#include <cstdint>

#include "common/dropped.h"
#include "common/plan_bounds.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {

// Takes the next number for each lane that wants one, in the order of the lanes: lanes
// with equal keys number themselves after the counter's value, and the last of them
// moves it on. By all lanes of a warp.
__device__ inline std::int32_t TakeNumber(std::int32_t* counters, std::int32_t key,
                                          bool wants) {
  const std::int32_t wanted = wants ? key : kDropped;
  const unsigned equals = __match_any_sync(kAllLanes, wanted);
  const unsigned below = equals & ((1U << Lane()) - 1);
  const std::int32_t number = wants ? counters[key] + __popc(below) : kDropped;
  __syncwarp();
  const bool is_last = (equals >> Lane()) == 1;
  if (wants && is_last) counters[key] = number + 1;
  __syncwarp();
  return number;
}

// Sets the counters of some neighbouring columns to what comes before the tile.
__device__ inline void SetCounters(const PlanTables& tables, const Tile& tile,
                                   std::int64_t first, std::int64_t count,
                                   std::int32_t* counters) {
  for (std::int64_t c = first + Lane(); c < first + count; c += kWarpSize) {
    counters[c] = tables.placed[tile.row * tables.columns + c] +
                  (c < tables.args.num_experts ? tables.group_start[c] : 0);
  }
}

// Sets the counters that the tile's choices ask: its source needs those of all columns,
// the ranks that receive from it their own.
__device__ inline void SetCounters(const PlanTables& tables, const Tile& tile,
                                   std::int32_t* counters) {
  if (tables.IsWanted(tile.source)) {
    SetCounters(tables, tile, 0, tables.columns, counters);
  } else {
    const std::int64_t local = tables.args.num_local_experts();
    for (std::int64_t i = 0; i < tables.ranks.num_stacked; ++i) {
      const std::int32_t dest = tables.ranks.ranks[i];
      if (!IsIndex(dest, tables.args.num_ranks)) continue;
      SetCounters(tables, tile, dest * local, local, counters);
      SetCounters(tables, tile, tables.DestColumn(dest), 1, counters);
    }
  }
  __syncwarp();
}

// Numbers the tile's choices in their order, and tells both ends of each where its row
// is, if their plans are made. Returns how many of this lane's found no room.
__device__ inline std::int32_t PlaceTile(const PlanTables& tables, const Tile& tile,
                                         std::int32_t* counters) {
  const PlanArgs& args = tables.args;
  SetCounters(tables, tile, counters);
  const bool is_sent = tables.IsWanted(tile.source);
  const auto experts = static_cast<std::int32_t>(args.num_experts);
  const auto local = static_cast<std::int32_t>(args.num_local_experts());
  std::int32_t dropped = 0;
#pragma unroll
  for (int j = 0; j < kChoicesPerLane; ++j) {
    const std::int32_t i = tile.Choice(j);
    const std::int32_t expert = tile.experts[j];
    const std::int32_t dest = expert == kDropped ? 0 : expert / local;
    const bool is_kept =
        expert != kDropped && tables.IsKept(tables.Priority(tile.source, i), dest);
    const bool is_received = is_kept && tables.IsWanted(dest);
    const bool is_placed = is_kept && (is_sent || is_received);
    const std::int32_t target = TakeNumber(counters, expert, is_placed);
    const std::int32_t entry = TakeNumber(counters, experts + dest, is_received);
    if (expert != kDropped && !is_kept) ++dropped;
    if (is_sent && i < tile.end) {
      const PlanArrays own = tables.OutputsOf(tile.source);
      own.send_rank[i] = is_kept ? dest : kDropped;
      own.send_row[i] = target;
      own.kept[i] = is_kept;
    }
    if (!is_received) continue;
    const PlanArrays theirs = tables.OutputsOf(dest);
    theirs.recv_choice[entry] =
        static_cast<std::int32_t>(tile.source * args.choices_per_rank() + i);
    theirs.recv_row[entry] = target;
  }
  return dropped;
}

// Gives the tile's kept choices their rows.
template <typename Shared>
__device__ void PlaceChoicesOf(const PlanTables& tables, std::int64_t row,
                               Shared& shared) {
  const Tile tile(tables, row);
  std::int64_t dropped = 0;
  WithCounters(tables, row, shared, [&](std::int32_t* counters) {
    dropped = PlaceTile(tables, tile, counters);
  });
  dropped = WarpSum(dropped);
  if (Lane() == 0 && dropped > 0 && tables.IsWanted(tile.source)) {
    atomicAdd(tables.OutputsOf(tile.source).num_dropped,
              static_cast<std::int32_t>(dropped));
  }
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PLAN_PLACEMENT_H_
