// Scales tokens into rows on a GPU. Unlike copies, those of one token all differ.

#include <cstdint>

#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/gather_scaled.h"
#include "cuda/peers.h"
#include "cuda/received.h"

namespace jax_ep::cuda {
namespace {

using ArgsWithTokens =
    WithPeers<GatherRowsArgs, &GatherRowsArgs::x, &GatherRowsArgs::weights>;

// Writes one entry's row: its token, scaled by its choice's weight. By one warp.
template <typename E, int count>
__device__ void ScaleToken(const GatherRowsArgs& args, std::int64_t entry) {
  using Sum = typename E::Sum;
  const std::int32_t token = args.TokenOf(entry);
  const std::int32_t row = args.recv_row[entry];
  if (token == kNoToken || !IsIndex(row, args.capacity)) return;
  const Source source = SourceOf(args, token);
  const auto k = args.recv_choice[entry] % static_cast<std::int32_t>(args.num_topk);
  const auto* weights = static_cast<const float*>(args.weights[source.rank]);
  const auto weight =
      static_cast<Sum>(LoadPeer(weights + source.token * args.num_topk + k));
  const char* from =
      static_cast<const char*>(args.x[source.rank]) + source.token * args.row_bytes;
  char* to = static_cast<char*>(args.rows) + row * args.row_bytes;
#pragma unroll 4
  for (std::int64_t h = Lane() * count; h < args.hidden; h += kWarpSize * count) {
    Elements<E, count> elements = LoadElements<E, count>(from, h);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      elements.at[i] = E::Round(weight * E::Load(elements.at[i]));
    }
    StoreElements<E, count>(to, h, elements);
  }
}

// A warp per entry of the receive list at a time.
template <typename E, int count>
__global__ void __launch_bounds__(kThreads, 1)
    GatherScaledKernel(const __grid_constant__ ArgsWithTokens first) {
  const GatherRowsArgs args = first.OfStacked(blockIdx.x);
  const Received received = ReceivedBy(args);
  for (std::int64_t entry = WarpOfRank(); entry < received.entries;
       entry += WarpsOfRank()) {
    ScaleToken<E, count>(args, entry);
  }
  using Unit = std::conditional_t<count == 1, typename E::Storage, uint4>;
  ZeroUnfilled<Unit>(args, received.rows);
}

}  // namespace

cudaError_t GatherScaled(const GatherRowsArgs& args, std::int64_t num_stacked,
                         cudaStream_t stream) {
  if (args.row_bytes == 0) return cudaSuccess;
  return VisitElements(args.dtype, args.hidden, [&](auto e, auto count) {
    return LaunchStacked<GatherScaledKernel<decltype(e), count()>>(
        args, num_stacked, args.capacity, kWarps, kThreads, stream);
  });
}

}  // namespace jax_ep::cuda
