// Copies tokens into rows on a GPU, in the widest units that a row consists of.

#include <cstdint>

#include "cuda/device.h"
#include "cuda/gather_rows.h"
#include "cuda/peers.h"
#include "cuda/received.h"

namespace jax_ep::cuda {
namespace {

using ArgsWithTokens = WithPeers<GatherRowsArgs, &GatherRowsArgs::x>;

// Narrow units are for odd rows, which are short as a rule.
template <typename Unit>
inline constexpr int kLoadsInFlight = sizeof(Unit) >= 4 ? 8 : 4;

// Copies one token to the rows of entries [first, end) of the receive list, by one
// warp. It is read once, however many rows want it.
template <typename Unit>
__device__ void CopyToken(const GatherRowsArgs& args, std::int32_t token,
                          std::int64_t first, std::int64_t end) {
  const Source source = SourceOf(args, token);
  const auto* from = reinterpret_cast<const Unit*>(
      static_cast<const char*>(args.x[source.rank]) + source.token * args.row_bytes);
  const std::int64_t units = args.row_bytes / static_cast<std::int64_t>(sizeof(Unit));
  for (std::int64_t begin = Lane(); begin < units;
       begin += kLoadsInFlight<Unit> * kWarpSize) {
    Unit held[kLoadsInFlight<Unit>];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight<Unit>; ++i) {
      if (begin + i * kWarpSize < units)
        held[i] = LoadPeer(from + begin + i * kWarpSize);
    }
    for (std::int64_t entry = first; entry < end; ++entry) {
      const std::int32_t row = args.recv_row[entry];
      if (!IsIndex(row, args.capacity)) continue;
      auto* to =
          reinterpret_cast<Unit*>(static_cast<char*>(args.rows) + row * args.row_bytes);
#pragma unroll
      for (int i = 0; i < kLoadsInFlight<Unit>; ++i) {
        if (begin + i * kWarpSize < units) to[begin + i * kWarpSize] = held[i];
      }
    }
  }
}

// A rank's warps share the receive list. Each takes entries that are the first of their
// token, with those of the same token behind them.
template <typename Unit>
__global__ void __launch_bounds__(kThreads, 1)
    GatherRowsKernel(const __grid_constant__ ArgsWithTokens first) {
  const GatherRowsArgs args = first.OfStacked(blockIdx.x);
  const Received received = ReceivedBy(args);
  for (std::int64_t entry = WarpOfRank(); entry < received.entries;
       entry += WarpsOfRank()) {
    const std::int32_t token = args.TokenOf(entry);
    if (token == kNoToken) continue;
    if (entry > 0 && args.TokenOf(entry - 1) == token) continue;
    std::int64_t end = entry + 1;
    while (end < received.entries && args.TokenOf(end) == token) ++end;
    CopyToken<Unit>(args, token, entry, end);
  }
  ZeroUnfilled<Unit>(args, received.rows);
}

}  // namespace

cudaError_t GatherRows(const GatherRowsArgs& args, std::int64_t num_stacked,
                       cudaStream_t stream) {
  if (args.row_bytes == 0) return cudaSuccess;
  const auto launch = [&]<typename Unit>(Unit) {
    return LaunchStacked<GatherRowsKernel<Unit>>(args, num_stacked, args.capacity,
                                                 kWarps, kThreads, stream);
  };
  // XLA aligns its buffers, so that the rows decide which units they consist of.
  if (AreAligned(16, args.row_bytes)) return launch(uint4());
  if (AreAligned(4, args.row_bytes)) return launch(std::uint32_t());
  if (AreAligned(2, args.row_bytes)) return launch(std::uint16_t());
  return launch(std::uint8_t());
}

}  // namespace jax_ep::cuda
