#include <cstdint>

#include "cuda/plan_tables.h"

namespace jax_ep {
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

// Returns how many of a source's choices found no room, by a warp.
__device__ std::int32_t DroppedBy(const PlanTables& tables, std::int64_t source) {
  const std::int64_t first = source * tables.tiles_per_source;
  const std::int64_t ranks = tables.args.num_ranks;
  std::int64_t asked = 0;
  for (std::int64_t i = Lane(); i < tables.tiles_per_source * ranks; i += kWarpSize) {
    asked +=
        tables
            .asked[(first + i / ranks) * tables.columns + tables.DestColumn(i % ranks)];
  }
  std::int64_t kept = 0;
  for (std::int64_t dest = Lane(); dest < ranks; dest += kWarpSize) {
    kept += tables.args.OfStacked(tables.first, dest).recv_counts[source];
  }
  return static_cast<std::int32_t>(WarpSum(asked - kept));
}

// A warp per tile, which numbers its choices in their order.
__global__ void __launch_bounds__(kThreads) PlaceKernel(PlanTables tables) {
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * kWarps + WarpInBlock();
  if (row >= tables.rows()) return;
  const PlanArgs& args = tables.args;
  const Tile tile(tables, row);
  const PlanOutputs own = args.OfStacked(tables.first, tile.source);
  if (tile.begin == 0) {
    const std::int32_t dropped = DroppedBy(tables, tile.source);
    if (Lane() == 0) *own.num_dropped = dropped;
  }
  std::int32_t* counters = CountersOf(tables, row);
  for (std::int64_t c = Lane(); c < tables.columns; c += kWarpSize) {
    counters[c] = tables.placed[row * tables.columns + c] +
                  (c < args.num_experts ? tables.group_start[c] : 0);
  }
  __syncwarp();
  const auto local = static_cast<std::int32_t>(args.num_local_experts());
  const std::int32_t* choices = args.ChoicesOf(tile.source);
  for (std::int64_t begin = tile.begin; begin < tile.end; begin += kWarpSize) {
    const std::int64_t i = begin + Lane();
    const std::int32_t expert = i < tile.end ? LoadPeer(choices + i) : kDropped;
    const std::int32_t dest = expert == kDropped ? 0 : expert / local;
    const bool is_kept =
        expert != kDropped && tables.Priority(tile.source, i) < tables.cutoff[dest];
    const std::int32_t target = TakeNumber(counters, expert, is_kept);
    const std::int32_t entry = TakeNumber(counters, tables.DestColumn(dest), is_kept);
    if (i >= tile.end) continue;
    own.send_row[i] = target;
    own.kept[i] = is_kept;
    if (!is_kept) continue;
    const PlanOutputs theirs = args.OfStacked(tables.first, dest);
    theirs.recv_choice[entry] =
        static_cast<std::int32_t>(tile.source * args.choices_per_rank() + i);
    theirs.recv_row[entry] = target;
  }
}

}  // namespace

cudaError_t Place(const PlanTables& tables, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((tables.rows() + kWarps - 1) / kWarps));
  return Launch(PlaceKernel, blocks, kThreads, stream, tables);
}

}  // namespace jax_ep
