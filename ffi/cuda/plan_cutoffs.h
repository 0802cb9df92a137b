// Finding where a rank stops that is asked for more than it holds: by a block.

#ifndef JAX_EP_FFI_CUDA_PLAN_CUTOFFS_H_
#define JAX_EP_FFI_CUDA_PLAN_CUTOFFS_H_

#include <cstdint>

#include "cuda/plan_tables.h"

namespace jax_ep::cuda {

// Neighbours in the order of priority: what a lane loads at once, and all of its warp.
inline constexpr int kPerLoad = 8;
inline constexpr std::int64_t kPerChunk = std::int64_t{kPerLoad} * kWarpSize;

// Which of the kPerLoad choices from `first` on go to `dest`, as the bits of a number;
// none, from `end` on. What fills up the last load counts: it lies behind all cutoffs.
__device__ inline unsigned WhichGoTo(const PlanTables& tables, std::int64_t dest,
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

// What the warps of a block count, up to as many as a warp has lanes.
struct WarpCounts {
  std::int32_t of_warp[kWarpSize];
};

// The sum of all threads' numbers, by a block, which has read `counts` before.
template <int kBlockWarps>
__device__ std::int64_t BlockSum(std::int64_t value, WarpCounts& counts) {
  value = WarpSum(value);
  if (Lane() == 0) counts.of_warp[WarpInBlock()] = static_cast<std::int32_t>(value);
  __syncthreads();
  const std::int64_t sum = WarpSum(Lane() < kBlockWarps ? counts.of_warp[Lane()] : 0);
  __syncthreads();
  return sum;
}

// Returns the priority of the choice that goes to `dest` after `fits` others, by a
// block: its warps share the order of priorities, count, and go on together in the part
// of which that choice is.
template <int kBlockWarps>
__device__ std::int64_t FindCutoff(const PlanTables& tables, std::int64_t dest,
                                   std::int64_t fits, WarpCounts& counts) {
  std::int64_t begin = 0;
  std::int64_t end = tables.args.num_ranks * tables.args.choices_per_rank();
  std::int64_t part = 0;  // how many choices a warp counts
  while (part != kPerChunk) {
    const std::int64_t chunks = (end - begin + kPerChunk - 1) / kPerChunk;
    part = (chunks + kBlockWarps - 1) / kBlockWarps * kPerChunk;
    const std::int64_t own = begin + WarpInBlock() * part;
    std::int64_t count = 0;
#pragma unroll 8
    for (std::int64_t i = 0; i < part; i += kPerChunk) {
      count += __popc(
          WhichGoTo(tables, dest, own + i + std::int64_t{Lane()} * kPerLoad, end));
    }
    count = WarpSum(count);
    if (Lane() == 0) counts.of_warp[WarpInBlock()] = static_cast<std::int32_t>(count);
    __syncthreads();
    int warp = 0;
    while (counts.of_warp[warp] <= fits) fits -= counts.of_warp[warp++];
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

// Finds the first choice that does not fit on a rank, if there is one.
template <int kBlockWarps>
__device__ void FindCutoffOf(const PlanTables& tables, std::int64_t dest,
                             WarpCounts& counts) {
  std::int64_t asked = 0;
  for (std::int64_t row = threadIdx.x; row < tables.rows(); row += blockDim.x) {
    asked += tables.asked[row * tables.columns + tables.DestColumn(dest)];
  }
  const std::int64_t incoming = BlockSum<kBlockWarps>(asked, counts);
  const std::int64_t cutoff =
      incoming <= tables.Budget()
          ? kKeepAll
          : FindCutoff<kBlockWarps>(tables, dest, tables.Budget(), counts);
  if (threadIdx.x == 0) tables.cutoff[dest] = static_cast<std::int32_t>(cutoff);
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PLAN_CUTOFFS_H_
