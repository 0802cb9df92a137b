// Last kernel of a plan: gives each kept choice its row.

#include <cstdint>

#include "common/dropped.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

// Takes the next number for each lane that wants one, in the order of the lanes: lanes
// with equal keys number themselves after the counter's value, and the last of them
// moves it on. By all lanes of a warp.
__device__ std::int32_t TakeNumber(std::int32_t* counters, std::int64_t key,
                                   bool wants) {
  const auto wanted = static_cast<int>(wants ? key : -1);
  const unsigned equals = __match_any_sync(kAllLanes, wanted);
  const unsigned below = equals & ((1U << Lane()) - 1);
  const std::int32_t number = wants ? counters[key] + __popc(below) : kDropped;
  __syncwarp();
  const bool is_last = (equals >> Lane()) == 1;
  if (wants && is_last) counters[key] = number + 1;
  __syncwarp();
  return number;
}

// Numbers the tile's choices in their order, and tells both ends of each where its row
// is. Returns how many of this lane's found no room.
__device__ std::int32_t PlaceTile(const PlanTables& tables, const Tile& tile,
                                  std::int32_t* counters) {
  const PlanArgs& args = tables.args;
  for (std::int64_t c = Lane(); c < tables.columns; c += kWarpSize) {
    counters[c] = tables.placed[tile.row * tables.columns + c] +
                  (c < args.num_experts ? tables.group_start[c] : 0);
  }
  __syncwarp();
  const PlanArrays own = args.OfStacked(tables.first, tile.source);
  const auto local = static_cast<std::int32_t>(args.num_local_experts());
  std::int32_t dropped = 0;
#pragma unroll
  for (int j = 0; j < kChoicesPerLane; ++j) {
    const std::int64_t i = tile.Choice(j);
    const std::int32_t expert = tile.experts[j];
    const std::int32_t dest = expert == kDropped ? 0 : expert / local;
    const bool is_kept =
        expert != kDropped && tables.Priority(tile.source, i) < tables.cutoff[dest];
    const std::int32_t target = TakeNumber(counters, expert, is_kept);
    const std::int32_t entry = TakeNumber(counters, tables.DestColumn(dest), is_kept);
    if (expert != kDropped && !is_kept) ++dropped;
    if (i >= tile.end) continue;
    own.send_rank[i] = is_kept ? dest : kDropped;
    own.send_row[i] = target;
    own.kept[i] = is_kept;
    if (!is_kept) continue;
    const PlanArrays theirs = args.OfStacked(tables.first, dest);
    theirs.recv_choice[entry] =
        static_cast<std::int32_t>(tile.source * args.choices_per_rank() + i);
    theirs.recv_row[entry] = target;
  }
  return dropped;
}

// A warp per tile.
__global__ void __launch_bounds__(kThreads, 1)
    PlaceKernel(const __grid_constant__ TablesWithChoices with_choices) {
  const PlanTables tables = with_choices.Bound();
  const std::int64_t row = TileRow();
  if (row >= tables.rows()) return;
  const Tile tile(tables, row);
  std::int64_t dropped = 0;
  WithCounters(tables, row, [&](std::int32_t* counters) {
    dropped = PlaceTile(tables, tile, counters);
  });
  dropped = WarpSum(dropped);
  if (Lane() == 0 && dropped > 0) {
    atomicAdd(tables.args.OfStacked(tables.first, tile.source).num_dropped,
              static_cast<std::int32_t>(dropped));
  }
}

}  // namespace

cudaError_t Place(const PlanTables& tables, cudaStream_t stream) {
  return LaunchOnTiles(PlaceKernel, tables, stream);
}

}  // namespace jax_ep::cuda
