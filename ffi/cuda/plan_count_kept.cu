// Third kernel of a plan: counts the choices that find room.

#include <cstdint>

#include "cuda/plan_tables.h"

namespace jax_ep::cuda {
namespace {

// A warp per tile.
__global__ void __launch_bounds__(kThreads)
    CountKeptKernel(const __grid_constant__ TablesWithChoices with_choices) {
  const PlanTables tables = with_choices.Bound();
  const std::int64_t row = TileRow();
  if (row >= tables.rows()) return;
  if (!tables.Overflows()) {
    const std::int64_t begin = row * tables.columns;
    for (std::int64_t c = Lane(); c < tables.columns; c += kWarpSize) {
      tables.placed[begin + c] = tables.asked[begin + c];
    }
    return;
  }
  const Tile tile(tables, row);
  const auto local = static_cast<std::int32_t>(tables.args.num_local_experts());
  const auto is_kept = [&](std::int32_t expert, std::int64_t i) {
    return tables.Priority(tile.source, i) < tables.cutoff[expert / local];
  };
  CountTile(tables, tile, is_kept, tables.placed);
}

}  // namespace

cudaError_t CountKept(const PlanTables& tables, cudaStream_t stream) {
  return LaunchOnTiles(CountKeptKernel, tables, stream);
}

}  // namespace jax_ep::cuda
