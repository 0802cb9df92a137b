// Third kernel of a plan: counts the choices that find room.

#include <cstdint>

#include "cuda/plan_count.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

// A warp per tile.
__global__ void __launch_bounds__(kThreads)
    CountKeptKernel(const __grid_constant__ TablesWithChoices with_choices) {
  __shared__ TileCounters counters;
  const PlanTables tables = with_choices.Bound();
  const std::int64_t row = TileRow();
  if (row >= tables.rows() || !tables.Overflows()) return;
  CountKeptOf(tables, row, counters);
}

}  // namespace

cudaError_t CountKept(const PlanTables& tables, cudaStream_t stream) {
  return LaunchOnTiles(CountKeptKernel, tables, stream);
}

}  // namespace jax_ep::cuda
