// Copies tokens into rows on a GPU, in the widest units that a row consists of.

#include <cstdint>

#include "cuda/device.h"
#include "cuda/gather_rows.h"
#include "cuda/peers.h"
#include "cuda/wanted_rows.h"

namespace jax_ep::cuda {
namespace {

using ArgsWithTokens = WithPeers<GatherRowsArgs, &GatherRowsArgs::x>;

// Narrow units are for odd rows, which are short as a rule.
template <typename Unit>
inline constexpr int kLoadsInFlight = sizeof(Unit) >= 4 ? 8 : 4;

// Blocks that a processor shall hold.
constexpr int kBlocksEach = 3;

// Copies a piece of a token to all rows that want it, by one warp, which reads it once.
template <typename Unit>
__device__ void CopyPiece(const GatherRowsArgs& args, const WantedToken& wanted,
                          const Pieces& pieces) {
  const int left = pieces.left();
  const char* token =
      static_cast<const char*>(args.x[wanted.rank]) + wanted.token * args.row_bytes;
  const auto* from = reinterpret_cast<const Unit*>(token) + pieces.begin();
  auto* rows = static_cast<Unit*>(args.rows) + pieces.begin();
  Unit held[kLoadsInFlight<Unit>];
#pragma unroll
  for (int j = 0; j < kLoadsInFlight<Unit>; ++j) {
    if (j * kWarpSize < left) held[j] = LoadPeer(from + j * kWarpSize);
  }
  for (int first = 0; first < wanted.count; first += kWarpSize) {
    const std::int64_t own = RowOf(args, wanted, first + Lane());
#pragma unroll 1
    for (int i = 0; i < min(wanted.count - first, kWarpSize); ++i) {
      const std::int64_t row = __shfl_sync(kAllLanes, own, i);
      if (row == kNoRow) continue;
      auto* to =
          reinterpret_cast<Unit*>(reinterpret_cast<char*>(rows) + row * args.row_bytes);
#pragma unroll
      for (int j = 0; j < kLoadsInFlight<Unit>; ++j) {
        if (j * kWarpSize < left) StoreToRow(to + j * kWarpSize, held[j]);
      }
    }
  }
}

// A rank's warps share its receive list, or its tokens.
template <typename Unit>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    GatherRowsKernel(const __grid_constant__ ArgsWithTokens first) {
  const GatherRowsArgs args = first.OfStacked(blockIdx.x);
  const Received received = ReceivedBy(args);
  const std::int64_t positions = Positions(args, received);
  const int units = static_cast<int>(args.row_bytes) / static_cast<int>(sizeof(Unit));
  for (Pieces pieces(units, kLoadsInFlight<Unit>); pieces.position() < positions;
       pieces.Next()) {
    const WantedToken wanted = WantedAt(args, received, pieces.position());
    if (wanted.count > 0) CopyPiece<Unit>(args, wanted, pieces);
  }
  ZeroUnfilled<Unit>(args, received.rows);
}

}  // namespace

cudaError_t GatherRows(const GatherRowsArgs& args, std::int64_t num_stacked,
                       cudaStream_t stream) {
  if (args.row_bytes == 0) return cudaSuccess;
  if (args.row_bytes > kMaxRowBytes) return cudaErrorInvalidValue;
  const GatherRowsArgs first = ForLaunch(args, num_stacked);
  const auto launch = [&]<typename Unit>(Unit) {
    const std::int64_t units = args.row_bytes / static_cast<std::int64_t>(sizeof(Unit));
    return LaunchStacked<GatherRowsKernel<Unit>>(
        first, num_stacked, NumPieces(first, units, kLoadsInFlight<Unit>), kWarps,
        kThreads, stream);
  };
  // XLA aligns its buffers, so that the rows decide which units they consist of.
  if (AreAligned(16, args.row_bytes)) return launch(uint4());
  if (AreAligned(4, args.row_bytes)) return launch(std::uint32_t());
  if (AreAligned(2, args.row_bytes)) return launch(std::uint16_t());
  return launch(std::uint8_t());
}

}  // namespace jax_ep::cuda
