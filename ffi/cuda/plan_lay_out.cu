// Fourth kernel of a plan: turns counts into where things start, and writes what is
// known before any choice is placed.

#include <cstdint>

#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

constexpr int kLayOutWarps = 32;
constexpr int kLayOutThreads = kLayOutWarps * kWarpSize;

// Sums of up to 32 neighbouring columns of a table, a column per lane, a run of rows
// per warp.
struct Columns {
  std::int32_t sums[kLayOutWarps][kWarpSize];
};

// Turns up to 32 columns of `placed` from counts into the sums of the rows before, by a
// block; returns each lane's total.
__device__ std::int32_t ScanColumns(const PlanTables& tables, std::int64_t first,
                                    std::int64_t count, Columns& columns) {
  const std::int64_t run = (tables.rows() + kLayOutWarps - 1) / kLayOutWarps;
  const std::int64_t begin = WarpInBlock() * run;
  const std::int64_t end = min(begin + run, tables.rows());
  const bool is_here = Lane() < count;
  std::int32_t* column = tables.placed + first + Lane();
  std::int32_t sum = 0;
#pragma unroll 8
  for (std::int64_t row = begin; row < end; ++row) {
    if (is_here) sum += column[row * tables.columns];
  }
  __syncthreads();  // the sums of the columns before have been read
  columns.sums[WarpInBlock()][Lane()] = sum;
  __syncthreads();
  std::int32_t before = 0;
  std::int32_t total = 0;
  for (int warp = 0; warp < kLayOutWarps; ++warp) {
    if (warp == WarpInBlock()) before = total;
    total += columns.sums[warp][Lane()];
  }
#pragma unroll 8
  for (std::int64_t row = begin; row < end; ++row) {
    if (!is_here) continue;
    const std::int32_t here = column[row * tables.columns];
    column[row * tables.columns] = before;
    before += here;
  }
  return total;
}

// Lays out the groups of a rank's experts: all ranks that send it something ask where
// these start.
__device__ void LayOutGroups(const PlanTables& tables, std::int64_t dest,
                             Columns& columns) {
  const std::int64_t num_local = tables.args.num_local_experts();
  const bool is_wanted = tables.IsWanted(dest);
  const auto alignment = static_cast<std::int32_t>(tables.args.alignment);
  std::int64_t start = 0;
  for (std::int64_t e = 0; e < num_local; e += kWarpSize) {
    const std::int64_t count = min(num_local - e, static_cast<std::int64_t>(kWarpSize));
    const std::int32_t rows = ScanColumns(tables, dest * num_local + e, count, columns);
    if (WarpInBlock() != 0) continue;
    const std::int32_t size =
        Lane() < count ? (rows + alignment - 1) / alignment * alignment : 0;
    const std::int64_t end = start + WarpScan(size);
    if (Lane() < count) {
      if (is_wanted) {
        const PlanArrays plan = tables.OutputsOf(dest);
        plan.group_rows[e + Lane()] = rows;
        plan.group_sizes[e + Lane()] = size;
      }
      tables.group_start[dest * num_local + e + Lane()] =
          static_cast<std::int32_t>(end - size);
    }
    start = __shfl_sync(kAllLanes, end, kWarpSize - 1);
  }
}

// Lays out a rank's receive list.
__device__ void LayOutReceived(const PlanTables& tables, std::int64_t dest,
                               Columns& columns) {
  __shared__ std::int32_t num_received;
  const std::int64_t column = tables.DestColumn(dest);
  const std::int32_t received = ScanColumns(tables, column, 1, columns);
  if (threadIdx.x == 0) num_received = received;
  __syncthreads();
  const PlanArrays plan = tables.OutputsOf(dest);
  for (std::int64_t s = threadIdx.x; s < tables.args.num_ranks; s += blockDim.x) {
    const std::int64_t row = s * tables.tiles_per_source;
    const std::int64_t next = row + tables.tiles_per_source;
    const std::int32_t end = next < tables.rows()
                                 ? tables.placed[next * tables.columns + column]
                                 : num_received;
    plan.recv_counts[s] = end - tables.placed[row * tables.columns + column];
  }
}

// Tells all outputs how many choices name the experts of one. A warp per expert.
__device__ void TellLoads(const PlanTables& tables, std::int64_t dest) {
  const std::int64_t num_local = tables.args.num_local_experts();
  for (std::int64_t e = WarpInBlock(); e < num_local; e += kLayOutWarps) {
    const std::int64_t expert = dest * num_local + e;
    std::int64_t sum = 0;
#pragma unroll 8
    for (std::int64_t row = Lane(); row < tables.rows(); row += kWarpSize) {
      sum += tables.asked[row * tables.columns + expert];
    }
    const auto load = static_cast<std::int32_t>(WarpSum(sum));
    for (std::int64_t i = Lane(); i < tables.ranks.num_stacked; i += kWarpSize) {
      tables.args.OfStacked(tables.first, i).expert_load[expert] = load;
    }
  }
}

// Three blocks per destination rank, one for each of these.
__global__ void __launch_bounds__(kLayOutThreads, 1) LayOutKernel(PlanTables tables) {
  __shared__ Columns columns;
  const std::int64_t dest = blockIdx.x;
  if (blockIdx.y == 0) {
    LayOutGroups(tables, dest, columns);
  } else if (blockIdx.y == 1) {
    if (tables.IsWanted(dest)) LayOutReceived(tables, dest, columns);
  } else {
    TellLoads(tables, dest);
    if (threadIdx.x != 0 || !tables.IsWanted(dest)) return;
    const PlanArrays plan = tables.OutputsOf(dest);
    *plan.num_dropped = 0;  // those that place choices add to it
    // Only ranks that might mix up two calls compare these.
    *plan.fingerprint = 0;
  }
}

}  // namespace

cudaError_t LayOut(const PlanTables& tables, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(tables.args.num_ranks), 3);
  return Launch(LayOutKernel, blocks, kLayOutThreads, stream, tables);
}

}  // namespace jax_ep::cuda
