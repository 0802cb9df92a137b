// First kernel of a plan: counts where the choices want to go.

#include <cstdint>

#include "cuda/plan_count.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

// A warp per tile.
__global__ void __launch_bounds__(kThreads)
    CountAskedKernel(const __grid_constant__ TablesWithChoices with_choices) {
  __shared__ TileCounters counters;
  const PlanTables tables = with_choices.Bound();
  if (blockIdx.x == 0) FindOutputs(tables);
  const std::int64_t row = TileRow();
  if (row < tables.rows()) CountAskedOf(tables, row, counters);
}

}  // namespace

cudaError_t CountAsked(const PlanTables& tables, cudaStream_t stream) {
  return LaunchOnTiles(CountAskedKernel, tables, stream);
}

}  // namespace jax_ep::cuda
