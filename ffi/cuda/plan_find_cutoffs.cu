// Second kernel of a plan: finds where ranks that are asked for too much stop.

#include <cstdint>

#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

constexpr int kCutoffWarps = 32;
constexpr int kCutoffThreads = kCutoffWarps * kWarpSize;

// Neighbours in the order of priority: what a lane loads at once, and all of its warp.
constexpr int kPerLoad = 8;
constexpr std::int64_t kPerChunk = std::int64_t{kPerLoad} * kWarpSize;

// Which of the kPerLoad choices from `first` on go to `dest`, as the bits of a number;
// none, from `end` on. What fills up the last load counts: it lies behind all cutoffs.
__device__ unsigned WhichGoTo(const PlanTables& tables, std::int64_t dest,
                              std::int64_t first, std::int64_t end) {
  if (first >= end) return 0;
  struct alignas(16) {
    std::uint16_t at[kPerLoad];
  } dests;
  static_assert(sizeof(dests) == sizeof(uint4));
  const uint4 v = *reinterpret_cast<const uint4*>(tables.dest_by_priority + first);
  __builtin_memcpy(&dests, &v, sizeof(v));
  unsigned which = 0;
#pragma unroll
  for (int j = 0; j < kPerLoad; ++j) {
    if (dests.at[j] == dest) which |= 1U << j;
  }
  return which;
}

// The sum of all threads' numbers, by a block, which has read `sums` before.
__device__ std::int64_t BlockSum(std::int64_t value, std::int32_t* sums) {
  value = WarpSum(value);
  if (Lane() == 0) sums[WarpInBlock()] = static_cast<std::int32_t>(value);
  __syncthreads();
  const std::int64_t sum = WarpSum(sums[Lane()]);
  __syncthreads();
  return sum;
}

// Returns the priority of the choice that goes to `dest` after `fits` others, by a
// block: its warps share the order of priorities, count, and go on together in the part
// of which that choice is.
__device__ std::int64_t FindCutoff(const PlanTables& tables, std::int64_t dest,
                                   std::int64_t fits, std::int32_t* counts) {
  std::int64_t begin = 0;
  std::int64_t end = tables.args.num_ranks * tables.args.choices_per_rank();
  std::int64_t part = 0;  // how many choices a warp counts
  while (part != kPerChunk) {
    const std::int64_t chunks = (end - begin + kPerChunk - 1) / kPerChunk;
    part = (chunks + kCutoffWarps - 1) / kCutoffWarps * kPerChunk;
    const std::int64_t own = begin + WarpInBlock() * part;
    std::int64_t count = 0;
#pragma unroll 8
    for (std::int64_t i = 0; i < part; i += kPerChunk) {
      count += __popc(
          WhichGoTo(tables, dest, own + i + std::int64_t{Lane()} * kPerLoad, end));
    }
    count = WarpSum(count);
    if (Lane() == 0) counts[WarpInBlock()] = static_cast<std::int32_t>(count);
    __syncthreads();
    int warp = 0;
    while (counts[warp] <= fits) fits -= counts[warp++];
    __syncthreads();  // all have read the counts
    begin += warp * part;
    end = min(begin + part, end);
  }
  const std::int64_t first = begin + std::int64_t{Lane()} * kPerLoad;
  const unsigned which = WhichGoTo(tables, dest, first, end);
  const std::int64_t before = WarpScan(__popc(which)) - __popc(which);
  std::int64_t cutoff = 0;
  for (int j = 0; j < kPerLoad; ++j) {
    const bool goes = (which >> j & 1) != 0;
    const std::int64_t place = before + __popc(which & ((1U << j) - 1));
    if (goes && place == fits) cutoff = first + j;
  }
  return WarpSum(cutoff);  // one lane has it
}

// A block per destination rank. Only one that is asked for more than it holds looks for
// the first choice that does not fit.
__global__ void __launch_bounds__(kCutoffThreads, 1)
    FindCutoffsKernel(PlanTables tables) {
  __shared__ std::int32_t counts[kCutoffWarps];
  const std::int64_t dest = blockIdx.x;
  const std::int64_t budget = tables.args.capacity - tables.args.num_local_experts() *
                                                         (tables.args.alignment - 1);
  std::int64_t asked = 0;
  for (std::int64_t row = threadIdx.x; row < tables.rows(); row += kCutoffThreads) {
    asked += tables.asked[row * tables.columns + tables.DestColumn(dest)];
  }
  const std::int64_t incoming = BlockSum(asked, counts);
  const std::int64_t cutoff =
      incoming <= budget ? kKeepAll : FindCutoff(tables, dest, budget, counts);
  if (threadIdx.x == 0) tables.cutoff[dest] = static_cast<std::int32_t>(cutoff);
}

}  // namespace

cudaError_t FindCutoffs(const PlanTables& tables, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(tables.args.num_ranks));
  return Launch(FindCutoffsKernel, blocks, kCutoffThreads, stream, tables);
}

}  // namespace jax_ep::cuda
