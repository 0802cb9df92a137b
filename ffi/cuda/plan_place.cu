// Last kernel of a plan: gives each kept choice its row.

#include <cstdint>

#include "cuda/plan_placement.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

// A warp per tile.
__global__ void __launch_bounds__(kThreads, 1)
    PlaceKernel(const __grid_constant__ TablesWithChoices with_choices) {
  __shared__ TileCounters counters;
  const PlanTables tables = with_choices.Bound();
  const std::int64_t row = TileRow();
  if (row < tables.rows()) PlaceChoicesOf(tables, row, counters);
}

}  // namespace

cudaError_t Place(const PlanTables& tables, cudaStream_t stream) {
  return LaunchOnTiles(PlaceKernel, tables, stream);
}

}  // namespace jax_ep::cuda
