// How many blocks kernels are launched with.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "check.h"
#include "common/peer_table.h"
#include "cuda/launch.h"
#include "cuda_launches.h"

namespace jax_ep::cuda {
namespace {

struct GridArgs {
  PeerTable table;
  std::int64_t num_ranks;
  dim3* grid;

  GridArgs OfStacked(std::int64_t) const { return *this; }
};

using GridArgsWithTable = WithPeers<GridArgs, &GridArgs::table>;

__global__ void NoteGrid(const __grid_constant__ GridArgsWithTable args) {
  *args.Bound().grid = gridDim;
}

dim3 GridFor(std::int64_t num_stacked, std::int64_t items, std::int64_t per_block) {
  dim3 grid(0, 0);
  const GridArgs args = {.table = PeerTable(), .num_ranks = 1, .grid = &grid};
  EP_CHECK_RAN(
      LaunchStacked<NoteGrid>(args, num_stacked, items, per_block, 64, nullptr));
  return grid;
}

// All blocks are there from the beginning, whatever the number of ranks.
EP_TEST(NoBlockWaitsForOthersToEnd) {
  std::int64_t resident = 0;
  EP_CHECK_RAN(CountResidentBlocks<NoteGrid>(64, &resident));
  EP_CHECK(resident >= 8);
  for (std::int64_t stacked = 1; stacked <= resident; ++stacked) {
    const dim3 grid = GridFor(stacked, 1000, 1);
    EP_CHECK_EQ(std::int64_t{grid.x}, stacked);
    EP_CHECK_EQ(std::int64_t{grid.y}, resident / stacked);
  }
}

EP_TEST(EachRankHasABlock) {
  std::int64_t resident = 0;
  EP_CHECK_RAN(CountResidentBlocks<NoteGrid>(64, &resident));
  const dim3 grid = GridFor(3 * resident, 1000, 1);
  EP_CHECK_EQ(std::int64_t{grid.x}, 3 * resident);
  EP_CHECK_EQ(grid.y, 1U);
}

EP_TEST(NoBlockHasNothingToDo) {
  EP_CHECK_EQ(GridFor(2, 7, 4).y, 2U);
  EP_CHECK_EQ(GridFor(2, 8, 4).y, 2U);
  EP_CHECK_EQ(GridFor(2, 1, 4).y, 1U);
  EP_CHECK_EQ(GridFor(2, 0, 4).x, 0U);
  EP_CHECK_EQ(GridFor(0, 9, 4).x, 0U);
}

}  // namespace
}  // namespace jax_ep::cuda
