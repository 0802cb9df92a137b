// Multiplies rows on a GPU, and adds up in the same order as a CPU.

#include <cstdint>

#include "common/plan_bounds.h"
#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/peers.h"
#include "cuda/row_dots.h"

namespace jax_ep::cuda {
namespace {

using ArgsWithRows = WithPeers<RowDotsArgs, &RowDotsArgs::rows>;

// The contract's order of additions: 64 running sums, of every 64th element each, that
// are then added up in halves. A lane of the warp holds two neighbouring ones.
constexpr int kSumsPerLane = 2;
constexpr int kSums = kSumsPerLane * kWarpSize;

// A lane's next elements, of which rows of odd length may not have two.
template <typename E>
struct alignas(kSumsPerLane * sizeof(typename E::Storage)) Pair {
  typename E::Storage at[kSumsPerLane];
};

template <typename E>
__device__ float Dot(const void* a, const void* b, std::int64_t hidden) {
  using Sum = typename E::Sum;
  using Storage = typename E::Storage;
  const auto* x = static_cast<const Storage*>(a);
  const auto* y = static_cast<const Storage*>(b);
  Sum sums[kSumsPerLane] = {};
  const std::int64_t first = Lane() * kSumsPerLane;
  if (hidden % kSumsPerLane == 0) {
#pragma unroll 4
    for (std::int64_t h = first; h < hidden; h += kSums) {
      const auto p = LoadPeer(reinterpret_cast<const Pair<E>*>(x + h));
      const auto q = *reinterpret_cast<const Pair<E>*>(y + h);
#pragma unroll
      for (int i = 0; i < kSumsPerLane; ++i) {
        sums[i] = Fma(Load<E>(p.at[i]), Load<E>(q.at[i]), sums[i]);
      }
    }
  } else {
    for (std::int64_t h = first; h < hidden; h += kSums) {
#pragma unroll
      for (int i = 0; i < kSumsPerLane; ++i) {
        if (h + i == hidden) break;
        sums[i] = Fma(Load<E>(LoadPeer(x + h + i)), Load<E>(y[h + i]), sums[i]);
      }
    }
  }
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < kSumsPerLane; ++i) {
      sums[i] += __shfl_down_sync(kAllLanes, sums[i], lanes);
    }
  }
  return static_cast<float>(sums[0] + sums[1]);
}

// A warp per choice at a time.
template <typename E>
__global__ void __launch_bounds__(kThreads, 1)
    RowDotsKernel(const __grid_constant__ ArgsWithRows first) {
  const RowDotsArgs args = first.OfStacked(blockIdx.x);
  const std::int64_t row_bytes = args.hidden * ByteWidth(args.dtype);
  const std::int64_t choices = args.num_tokens * args.num_topk;
  for (std::int64_t choice = WarpOfRank(); choice < choices; choice += WarpsOfRank()) {
    float dot = 0;
    if (HasRow(args, choice)) {
      const std::int32_t row = args.send_row[choice];
      const void* rows = args.rows[args.send_rank[choice]];
      const char* a = static_cast<const char*>(rows) + row * row_bytes;
      const char* b =
          static_cast<const char*>(args.dout) + choice / args.num_topk * row_bytes;
      dot = Dot<E>(a, b, args.hidden);
    }
    if (Lane() == 0) args.dots[choice] = dot;
  }
}

}  // namespace

cudaError_t RowDots(const RowDotsArgs& args, std::int64_t num_stacked,
                    cudaStream_t stream) {
  return VisitElements(args.dtype, args.hidden, [&](auto e, auto) {
    return LaunchStacked<RowDotsKernel<decltype(e)>>(
        args, num_stacked, args.num_tokens * args.num_topk, kWarps, kThreads, stream);
  });
}

}  // namespace jax_ep::cuda
