// For the kernels of a plan: their workspace, and how they work through the choices.

#ifndef JAX_EP_FFI_CUDA_PLAN_TABLES_H_
#define JAX_EP_FFI_CUDA_PLAN_TABLES_H_

#include <cstdint>
#include <limits>

#include "common/dropped.h"
#include "common/plan.h"
#include "common/plan_bounds.h"
#include "cuda/device.h"
#include "cuda/plan.h"

namespace jax_ep::cuda {

// A cutoff that no choice reaches.
inline constexpr std::int32_t kKeepAll = std::numeric_limits<std::int32_t>::max();

// Consecutive choices of one source that one warp counts and places, in their order.
inline constexpr int kChoicesPerLane = 8;
inline constexpr int kTileChoices = kChoicesPerLane * kWarpSize;

// In place of a destination rank: the choice goes nowhere.
inline constexpr std::uint16_t kNowhere = std::numeric_limits<std::uint16_t>::max();
inline constexpr std::int64_t kMaxRanks = kNowhere;

// Counters that a warp of a tile keeps in its block's shared memory; more are kept in
// global memory.
inline constexpr std::int64_t kSharedCounters = 1024;

// What the kernels of a plan tell each other, laid out in the workspace. Tables have a
// row per tile, in the order of the choices, and a column per expert and, behind them,
// per destination rank.
struct PlanTables {
  PlanTables() = default;
  PlanTables(const PlanArgs& plan, const PlanArrays& first_outputs,
             const PlanRanks& wanted, std::int32_t* space)
      : args(plan),
        topk_idx(plan.topk_idx),
        first(first_outputs),
        ranks(wanted),
        tiles_per_source(TilesPerSource(plan)),
        columns(plan.num_experts + plan.num_ranks),
        dest_by_priority(reinterpret_cast<std::uint16_t*>(space)),
        asked(space + DestWords(plan)),
        placed(asked + rows() * columns),
        scratch(placed + rows() * columns),
        group_start(scratch + ScratchWords(plan)),
        cutoff(group_start + plan.num_experts),
        output_of(cutoff + plan.num_ranks) {}

  static std::int64_t TilesPerSource(const PlanArgs& plan) {
    const std::int64_t tiles =
        (plan.choices_per_rank() + kTileChoices - 1) / kTileChoices;
    return tiles > 0 ? tiles : 1;
  }
  static std::int64_t TableWords(const PlanArgs& plan) {
    return plan.num_ranks * TilesPerSource(plan) * (plan.num_experts + plan.num_ranks);
  }
  static std::int64_t ScratchWords(const PlanArgs& plan) {
    return plan.num_experts + plan.num_ranks > kSharedCounters ? TableWords(plan) : 0;
  }
  static std::int64_t Words(const PlanArgs& plan) {
    return DestWords(plan) + 2 * TableWords(plan) + ScratchWords(plan) +
           plan.num_experts + 2 * plan.num_ranks;
  }
  // Whole vectors of 16 bytes, two ranks in a word.
  static std::int64_t DestWords(const PlanArgs& plan) {
    return (plan.num_ranks * plan.choices_per_rank() + 7) / 8 * 4;
  }

  __host__ __device__ std::int64_t rows() const {
    return args.num_ranks * tiles_per_source;
  }
  __device__ std::int64_t DestColumn(std::int64_t dest) const {
    return args.num_experts + dest;
  }
  // Whether this rank's plan is made, and its outputs if it is.
  __device__ bool IsWanted(std::int64_t rank) const {
    return output_of[rank] != kDropped;
  }
  __device__ PlanArrays OutputsOf(std::int64_t rank) const {
    return args.OfStacked(first, output_of[rank]);
  }
  // Choices that a rank has room for, whatever the padding.
  __host__ __device__ std::int64_t Budget() const {
    return args.capacity - args.num_local_experts() * (args.alignment - 1);
  }
  // Whether a rank may be asked for more. Else nobody looks for cutoffs.
  __host__ __device__ bool MayOverflow() const {
    return args.num_ranks * args.choices_per_rank() > Budget();
  }
  // Whether a choice of this priority finds room on its rank.
  __device__ bool IsKept(std::int32_t priority, std::int32_t dest) const {
    return !MayOverflow() || priority < cutoff[dest];
  }
  // Whether any rank is asked for more than it holds; by one warp.
  __device__ bool Overflows() const {
    if (!MayOverflow()) return false;
    bool overflows = false;
    for (std::int64_t dest = Lane(); dest < args.num_ranks; dest += kWarpSize) {
      overflows = overflows || cutoff[dest] != kKeepAll;
    }
    return __any_sync(kAllLanes, overflows) != 0;
  }
  // Position in the order (k, token, source rank) of a source's i-th choice. There are
  // fewer choices than 2^31.
  __device__ std::int32_t Priority(std::int32_t source, std::int32_t i) const {
    const auto topk = static_cast<std::int32_t>(args.num_topk);
    const auto num_tokens = static_cast<std::int32_t>(args.num_tokens);
    const auto num_ranks = static_cast<std::int32_t>(args.num_ranks);
    return (i % topk * num_tokens + i / topk) * num_ranks + source;
  }

  PlanArgs args;
  PeerTable topk_idx;  // that of args, bound to where its addresses are
  PlanArrays first;
  PlanRanks ranks;
  std::int64_t tiles_per_source;
  std::int64_t columns;
  std::uint16_t* dest_by_priority;  // of every choice, kNowhere: none
  std::int32_t* asked;              // choices in the tile
  std::int32_t* placed;   // those that find room, if any rank overflows; once laid out,
                          // how many do in the tiles before
  std::int32_t* scratch;  // counters for which shared memory has no room
  std::int32_t* group_start;  // [expert], its group's first row
  std::int32_t* cutoff;       // [rank] keeps choices of lower priority
  std::int32_t* output_of;    // [rank], which output is its, kDropped: none
};

// One tile, as the warp sees it that works on it. A lane holds every 32nd choice.
struct Tile {
  __device__ Tile(const PlanTables& tables, std::int64_t table_row)
      : row(static_cast<std::int32_t>(table_row)) {
    const auto tiles = static_cast<std::int32_t>(tables.tiles_per_source);
    const auto all = static_cast<std::int32_t>(tables.args.choices_per_rank());
    source = row / tiles;
    begin = row % tiles * kTileChoices;
    end = min(begin + kTileChoices, all);
    const auto* choices = static_cast<const std::int32_t*>(tables.topk_idx[source]);
#pragma unroll
    for (int j = 0; j < kChoicesPerLane; ++j) {
      experts[j] = Choice(j) < end ? LoadPeer(choices + Choice(j)) : kDropped;
    }
  }

  // Which of the source's choices is the lane's j-th; past the tile's end: none.
  __device__ std::int32_t Choice(int j) const { return begin + j * kWarpSize + Lane(); }

  std::int32_t row;
  std::int32_t source;
  std::int32_t begin;  // of the source's choices
  std::int32_t end;
  std::int32_t experts[kChoicesPerLane];
};

// The tile of this warp, in a kernel that LaunchOnTiles launched; past the last one for
// some.
__device__ inline std::int64_t TileRow() {
  return static_cast<std::int64_t>(blockIdx.x) * kWarps + WarpInBlock();
}

using TablesWithChoices = WithPeers<PlanTables, &PlanTables::topk_idx>;

// Launches a kernel that reads choices.
inline cudaError_t LaunchWithChoices(void (*kernel)(TablesWithChoices),
                                     const PlanTables& tables, dim3 blocks, int threads,
                                     cudaStream_t stream) {
  TablesWithChoices with_choices;
  if (!with_choices.Pack(tables, tables.args.num_ranks)) return cudaErrorInvalidValue;
  return Launch(kernel, blocks, threads, stream, with_choices);
}

// Launches one with a warp per tile.
inline cudaError_t LaunchOnTiles(void (*kernel)(TablesWithChoices),
                                 const PlanTables& tables, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((tables.rows() + kWarps - 1) / kWarps));
  return LaunchWithChoices(kernel, tables, blocks, kThreads, stream);
}

// The counters of a block's warps, as far as shared memory has room for them.
template <int kWarpsInBlock, std::int64_t kEach>
struct SharedCounters {
  std::int32_t of_warp[kWarpsInBlock][kEach];
};

// Those of kernels that LaunchOnTiles launches.
using TileCounters = SharedCounters<kWarps, kSharedCounters>;

// Calls use(counters) with as many counters for the warp as there are columns: in
// shared memory, or in its tile's row. Each is a call of its own, so that the compiler
// knows which memory it compiles for.
template <int kWarpsInBlock, std::int64_t kEach, typename Use>
__device__ void WithCounters(const PlanTables& tables, std::int64_t row,
                             SharedCounters<kWarpsInBlock, kEach>& shared, Use use) {
  if (tables.columns <= kEach) {
    use(shared.of_warp[WarpInBlock()]);
  } else {
    use(tables.scratch + row * tables.columns);
  }
}

// The kernels, in the order in which they run; those in the middle only where a rank
// may be asked for more than it holds.
cudaError_t CountAsked(const PlanTables& tables, cudaStream_t stream);
cudaError_t FindCutoffs(const PlanTables& tables, cudaStream_t stream);
cudaError_t CountKept(const PlanTables& tables, cudaStream_t stream);
cudaError_t LayOut(const PlanTables& tables, cudaStream_t stream);
cudaError_t Place(const PlanTables& tables, cudaStream_t stream);

// All of them in one, for exchanges so small that a block works on them.
bool FitsOneBlock(const PlanTables& tables);
cudaError_t MakeInOneBlock(const PlanTables& tables, cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PLAN_TABLES_H_
