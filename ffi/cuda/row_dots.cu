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

// Rows of one token that a warp multiplies together, which read its `dout` once.
constexpr int kRows = 4;

// Steps of kSums elements, of which all rows' loads are in flight: in all as many bytes
// for each dtype. Odd rows, whose elements come one by one, take one step at a time:
// with more, ptxas spills on some GPUs.
template <typename E, bool is_even>
constexpr int kSteps = is_even ? 8 / static_cast<int>(sizeof(typename E::Storage)) : 1;

// Blocks that a processor shall hold.
constexpr int kBlocksEach = 3;

template <typename E>
struct Sums {
  typename E::Sum at[kRows][kSumsPerLane];
};

// A lane's next elements of a row, whose end may cut them short. Of odd rows each comes
// by itself.
template <typename E, bool is_even>
__device__ Elements<E, kSumsPerLane> LoadPair(const void* row, int first, int hidden) {
  if constexpr (is_even) {
    return LoadElements<E, kSumsPerLane>(row, first);
  } else {
    Elements<E, kSumsPerLane> pair = {};
#pragma unroll
    for (int i = 0; i < kSumsPerLane; ++i) {
      if (first + i < hidden) {
        pair.at[i] = LoadElements<E, 1>(row, first + i).at[0];
      }
    }
    return pair;
  }
}

// A lane's sums of the products of up to kRows rows, of which some are null, with
// `dout`.
template <typename E, bool is_even>
__device__ Sums<E> MultiplyRows(const void* const (&rows)[kRows], const void* dout,
                                int hidden) {
  Sums<E> sums = {};
  for (int begin = Lane() * kSumsPerLane; begin < hidden;
       begin += kSteps<E, is_even> * kSums) {
    Elements<E, kSumsPerLane> held[kRows][kSteps<E, is_even>];
    Elements<E, kSumsPerLane> factors[kSteps<E, is_even>];
#pragma unroll
    for (int step = 0; step < kSteps<E, is_even>; ++step) {
      const int h = begin + step * kSums;
      if (h >= hidden) break;
      factors[step] = LoadPair<E, is_even>(dout, h, hidden);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (rows[r] != nullptr)
          held[r][step] = LoadPair<E, is_even>(rows[r], h, hidden);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps<E, is_even>; ++step) {
#pragma unroll
      for (int i = 0; i < kSumsPerLane; ++i) {
        if (begin + step * kSums + i >= hidden) break;
        const typename E::Sum factor = Load<E>(factors[step].at[i]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (rows[r] == nullptr) continue;
          sums.at[r][i] = Fma(Load<E>(held[r][step].at[i]), factor, sums.at[r][i]);
        }
      }
    }
  }
  return sums;
}

// Adds up all lanes' sums of a row; the first lane has the result.
template <typename E>
__device__ float AddUp(typename E::Sum (&sums)[kSumsPerLane]) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < kSumsPerLane; ++i) {
      sums[i] += __shfl_down_sync(kAllLanes, sums[i], lanes);
    }
  }
  return static_cast<float>(sums[0] + sums[1]);
}

// Multiplies a token's choices from k on, at most kRows of them. By one warp.
template <typename E>
__device__ void DotsOf(const RowDotsArgs& args, std::int32_t token, int k) {
  const std::int64_t row_bytes = args.hidden * ByteWidth(args.dtype);
  const std::int32_t first = token * static_cast<std::int32_t>(args.num_topk) + k;
  const int count = min(static_cast<int>(args.num_topk) - k, kRows);
  const void* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    rows[r] = nullptr;
    if (r >= count || !HasRow(args, first + r)) continue;
    rows[r] = static_cast<const char*>(args.rows[args.send_rank[first + r]]) +
              args.send_row[first + r] * row_bytes;
  }
  const char* dout = static_cast<const char*>(args.dout) + token * row_bytes;
  const auto hidden = static_cast<int>(args.hidden);
  Sums<E> sums = hidden % kSumsPerLane == 0
                     ? MultiplyRows<E, true>(rows, dout, hidden)
                     : MultiplyRows<E, false>(rows, dout, hidden);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= count) break;
    const float dot = AddUp<E>(sums.at[r]);
    if (Lane() == 0) args.dots[first + r] = dot;
  }
}

__host__ __device__ std::int64_t GroupsOf(std::int64_t num_topk) {
  return (num_topk + kRows - 1) / kRows;
}

// A warp for a few choices of a token at a time.
template <typename E>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    RowDotsKernel(const __grid_constant__ ArgsWithRows first) {
  const RowDotsArgs args = first.OfStacked(blockIdx.x);
  const auto groups = static_cast<std::int32_t>(GroupsOf(args.num_topk));
  const std::int64_t all_groups = args.num_tokens * groups;
  for (std::int64_t i = WarpOfRank(); i < all_groups; i += WarpsOfRank()) {
    const auto group = static_cast<std::int32_t>(i);
    DotsOf<E>(args, group / groups, group % groups * kRows);
  }
}

}  // namespace

cudaError_t RowDots(const RowDotsArgs& args, std::int64_t num_stacked,
                    cudaStream_t stream) {
  if (args.hidden * ByteWidth(args.dtype) > kMaxRowBytes) return cudaErrorInvalidValue;
  return VisitElements(args.dtype, args.hidden, [&](auto e, auto) {
    return LaunchStacked<RowDotsKernel<decltype(e)>>(
        args, num_stacked, args.num_tokens * GroupsOf(args.num_topk), kWarps, kThreads,
        stream);
  });
}

}  // namespace jax_ep::cuda
