// Scales tokens into rows on a GPU. Unlike copies, those of one token all differ.

#include <cstdint>

#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/gather_scaled.h"
#include "cuda/peers.h"
#include "cuda/wanted_rows.h"

namespace jax_ep::cuda {
namespace {

using ArgsWithTokens =
    WithPeers<GatherRowsArgs, &GatherRowsArgs::x, &GatherRowsArgs::weights>;

// Held until they are scaled into all rows: the compiler lifts no load over a store.
constexpr int kLoadsInFlight = 4;

// Blocks that a processor shall hold. Not told, ptxas takes registers that it can do
// without.
constexpr int kBlocksEach = 4;

template <typename E, int count>
__device__ Elements<E, count> Scaled(Elements<E, count> elements,
                                     typename E::Sum weight) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    elements.at[i] = Round<E>(weight * Load<E>(elements.at[i]));
  }
  return elements;
}

// Scales a piece of a token into all rows that want it, by one warp, which reads it
// once.
template <typename E, int count>
__device__ void ScalePiece(const GatherRowsArgs& args, const WantedToken& wanted,
                           const Pieces& pieces) {
  const int left = pieces.left();
  const char* token =
      static_cast<const char*>(args.x[wanted.rank]) + wanted.token * args.row_bytes;
  Elements<E, count> held[kLoadsInFlight];
#pragma unroll
  for (int j = 0; j < kLoadsInFlight; ++j) {
    const int at = (pieces.begin() + j * kWarpSize) * count;
    if (j * kWarpSize < left) held[j] = LoadElements<E, count>(token, at);
  }
  for (int first = 0; first < wanted.count; first += kWarpSize) {
    const std::int64_t own = RowOf(args, wanted, first + Lane());
    const float own_weight = WeightOf(args, wanted, first + Lane());
#pragma unroll 1
    for (int i = 0; i < min(wanted.count - first, kWarpSize); ++i) {
      const std::int64_t row = __shfl_sync(kAllLanes, own, i);
      const float weight = __shfl_sync(kAllLanes, own_weight, i);
      if (row == kNoRow) continue;
      char* to = static_cast<char*>(args.rows) + row * args.row_bytes;
#pragma unroll
      for (int j = 0; j < kLoadsInFlight; ++j) {
        if (j * kWarpSize >= left) break;
        StoreElementsToRow<E, count>(
            to, (pieces.begin() + j * kWarpSize) * count,
            Scaled(held[j], static_cast<typename E::Sum>(weight)));
      }
    }
  }
}

// A rank's warps share its receive list, or its tokens.
template <typename E, int count>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    GatherScaledKernel(const __grid_constant__ ArgsWithTokens first) {
  const GatherRowsArgs args = first.OfStacked(blockIdx.x);
  const Received received = ReceivedBy(args);
  const std::int64_t positions = Positions(args, received);
  for (Pieces pieces(static_cast<int>(args.hidden) / count, kLoadsInFlight);
       pieces.position() < positions; pieces.Next()) {
    const WantedToken wanted = WantedAt(args, received, pieces.position());
    if (wanted.count == 0) continue;
    ScalePiece<E, count>(args, wanted, pieces);
  }
  ZeroUnfilled<UnitOf<E, count>>(args, received.rows);
}

}  // namespace

cudaError_t GatherScaled(const GatherRowsArgs& args, std::int64_t num_stacked,
                         cudaStream_t stream) {
  if (args.row_bytes == 0) return cudaSuccess;
  if (args.row_bytes > kMaxRowBytes) return cudaErrorInvalidValue;
  const GatherRowsArgs first = ForLaunch(args, num_stacked);
  return VisitElements(args.dtype, args.hidden, [&](auto e, auto count) {
    const std::int64_t pieces =
        NumPieces(first, first.hidden / count(), kLoadsInFlight);
    return LaunchStacked<GatherScaledKernel<decltype(e), count()>>(
        first, num_stacked, pieces, kWarps, kThreads, stream);
  });
}

}  // namespace jax_ep::cuda
