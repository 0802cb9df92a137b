#include <cstdint>

#include "cuda/plan_tables.h"

namespace jax_ep {
namespace {

constexpr int kLayOutWarps = 16;
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

// How many choices of all ranks name an expert, by a warp.
__device__ std::int32_t LoadOf(const PlanTables& tables, std::int64_t expert) {
  std::int64_t sum = 0;
  for (std::int64_t row = Lane(); row < tables.rows(); row += kWarpSize) {
    sum += tables.asked[row * tables.columns + expert];
  }
  return static_cast<std::int32_t>(WarpSum(sum));
}

// A block per destination rank: lays out its groups and its receive list.
__global__ void __launch_bounds__(kLayOutThreads, 1) LayOutKernel(PlanTables tables) {
  __shared__ Columns columns;
  const PlanArgs& args = tables.args;
  const std::int64_t dest = blockIdx.x;
  const std::int64_t num_local = args.num_local_experts();
  const PlanOutputs plan = args.OfStacked(tables.first, dest);
  const auto alignment = static_cast<std::int32_t>(args.alignment);
  std::int64_t start = 0;
  for (std::int64_t e = 0; e < num_local; e += kWarpSize) {
    const std::int64_t count = min(num_local - e, static_cast<std::int64_t>(kWarpSize));
    const std::int32_t rows = ScanColumns(tables, dest * num_local + e, count, columns);
    if (WarpInBlock() != 0) continue;
    const std::int32_t size =
        Lane() < count ? (rows + alignment - 1) / alignment * alignment : 0;
    const std::int64_t end = start + WarpScan(size);
    if (Lane() < count) {
      plan.group_rows[e + Lane()] = rows;
      plan.group_sizes[e + Lane()] = size;
      tables.group_start[dest * num_local + e + Lane()] =
          static_cast<std::int32_t>(end - size);
    }
    start = __shfl_sync(kAllLanes, end, kWarpSize - 1);
  }
  const std::int64_t column = tables.DestColumn(dest);
  const std::int32_t received = ScanColumns(tables, column, 1, columns);
  __shared__ std::int32_t num_received;
  if (threadIdx.x == 0) num_received = received;
  __syncthreads();
  for (std::int64_t s = threadIdx.x; s < args.num_ranks; s += blockDim.x) {
    const std::int64_t row = s * tables.tiles_per_source;
    const std::int64_t next = row + tables.tiles_per_source;
    const std::int32_t end = next < tables.rows()
                                 ? tables.placed[next * tables.columns + column]
                                 : num_received;
    plan.recv_counts[s] = end - tables.placed[row * tables.columns + column];
  }
  for (std::int64_t e = WarpInBlock(); e < num_local; e += kLayOutWarps) {
    const std::int32_t load = LoadOf(tables, dest * num_local + e);
    for (std::int64_t rank = Lane(); rank < args.num_ranks; rank += kWarpSize) {
      args.OfStacked(tables.first, rank).expert_load[dest * num_local + e] = load;
    }
  }
  // Only ranks that might mix up two calls compare these.
  if (threadIdx.x == 0) *plan.fingerprint = 0;
}

}  // namespace

cudaError_t LayOut(const PlanTables& tables, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(tables.args.num_ranks));
  return Launch(LayOutKernel, blocks, kLayOutThreads, stream, tables);
}

}  // namespace jax_ep
