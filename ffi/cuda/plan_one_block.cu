// All kernels of a plan in one, for exchanges so small that launches would be most of
// their time.

#include <cstdint>

#include "cuda/plan_count.h"
#include "cuda/plan_cutoffs.h"
#include "cuda/plan_layout.h"
#include "cuda/plan_placement.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

// More would leave each thread too few registers.
constexpr int kBlockWarps = 16;
constexpr int kBlockThreads = kBlockWarps * kWarpSize;

// As many counters for a warp as fit: of 512 experts on up to 128 ranks. Nobody asks
// for more.
constexpr std::int64_t kCounters = 640;

// Two tiles per warp, of 8192 choices in all.
constexpr std::int64_t kMaxRows = 2 * kBlockWarps;

// A block, whose warps share tiles, and parts of the layout. Barriers stand where the
// other form of the plan has kernels end.
__global__ void __launch_bounds__(kBlockThreads, 1)
    MakeInOneBlockKernel(const __grid_constant__ TablesWithChoices with_choices) {
  __shared__ SharedCounters<kBlockWarps, kCounters> counters;
  __shared__ WarpCounts counts;
  const PlanTables tables = with_choices.Bound();
  const auto for_tiles = [&](auto work) {
    for (std::int64_t row = WarpInBlock(); row < tables.rows(); row += kBlockWarps) {
      work(tables, row, counters);
    }
    __syncthreads();
  };
  FindOutputs(tables);
  for_tiles([](auto&... of) { CountAskedOf(of...); });
  if (tables.MayOverflow()) {
    for (std::int64_t dest = 0; dest < tables.args.num_ranks; ++dest) {
      FindCutoffOf<kBlockWarps>(tables, dest, counts);
    }
    __syncthreads();
    if (tables.Overflows()) for_tiles([](auto&... of) { CountKeptOf(of...); });
  }
  for (std::int64_t part = WarpInBlock(); part < LayOutParts(tables);
       part += kBlockWarps) {
    LayOutPart<1>(tables, part, nullptr);
  }
  __syncthreads();
  for_tiles([](auto&... of) { PlaceChoicesOf(of...); });
}

}  // namespace

bool FitsOneBlock(const PlanTables& tables) {
  return tables.rows() <= kMaxRows && tables.columns <= kCounters;
}

cudaError_t MakeInOneBlock(const PlanTables& tables, cudaStream_t stream) {
  return LaunchWithChoices(MakeInOneBlockKernel, tables, dim3(1), kBlockThreads,
                           stream);
}

}  // namespace jax_ep::cuda
