// Adds up a token's rows on the GPU that holds them.

#include <algorithm>
#include <cstdint>

#include "common/dropped.h"
#include "common/plan_bounds.h"
#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/partial_sums.h"
#include "cuda/peers.h"

namespace jax_ep::cuda {
namespace {

using ArgsWithWeights = WithPeers<PartialSumsArgs, &PartialSumsArgs::weights>;

// Of a row at once, by each thread. More would take more registers, and so leave fewer
// warps that load.
constexpr int kLoadsInFlight = 2;

// Blocks that a processor shall hold.
constexpr int kBlocksEach = 4;

// The weight of an entry that has a token.
__device__ float WeightOf(const PartialSumsArgs& args, std::int64_t entry) {
  if (!args.weighted) return 1.0F;
  const std::int64_t choices = args.num_tokens * args.num_topk;
  const std::int32_t choice = args.recv_choice[entry];
  const auto of_source = choice % static_cast<std::int32_t>(choices);
  const auto source = choice / static_cast<std::int32_t>(choices);
  return LoadPeer(static_cast<const float*>(args.weights[source]) + of_source);
}

// What a thread adds up at once: some elements of a row, every `step` from `begin` on.
template <typename E, int count>
struct RunningSums {
  // Adds to each fma(weight, element of the row, sum).
  __device__ void Add(const void* row, typename E::Sum weight, int hidden) {
    Elements<E, count> held[kLoadsInFlight];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int h = begin + j * step;
      if (h < hidden) held[j] = LoadElements<E, count>(row, h);
    }
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      if (begin + j * step >= hidden) break;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        at[j][i] = Fma(weight, Load<E>(held[j].at[i]), at[j][i]);
      }
    }
  }

  // Writes them, rounded, to a row.
  __device__ void Write(void* row, int hidden) const {
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int h = begin + j * step;
      if (h >= hidden) break;
      Elements<E, count> out;
#pragma unroll
      for (int i = 0; i < count; ++i) out.at[i] = Round<E>(at[j][i]);
      StoreElements<E, count>(row, h, out);
    }
  }

  int begin;
  int step;
  typename E::Sum at[kLoadsInFlight][count];
};

// Adds up the rows of entries [first, end), which are this token's, by the threads of a
// block that share the elements. In ascending k, as the receive list is.
template <typename E, int count>
__device__ void SumEntries(const PartialSumsArgs& args, std::int32_t token,
                           std::int64_t first, std::int64_t end) {
  const std::int64_t row_bytes = args.hidden * ByteWidth(args.dtype);
  const auto hidden = static_cast<int>(args.hidden);
  const int step = static_cast<int>(blockDim.x) * count;
  for (int begin = static_cast<int>(threadIdx.x) * count; begin < hidden;
       begin += kLoadsInFlight * step) {
    RunningSums<E, count> sums = {.begin = begin, .step = step, .at = {}};
    std::int32_t to = kDropped;
#pragma unroll 1
    for (std::int64_t entry = first; entry < end; ++entry) {
      const std::int32_t row = args.recv_row[entry];
      if (!IsIndex(row, args.capacity)) continue;
      if (to == kDropped) to = row;
      const auto weight = static_cast<typename E::Sum>(WeightOf(args, entry));
      sums.Add(static_cast<const char*>(args.rows) + row * row_bytes, weight, hidden);
    }
    if (to == kDropped) return;
    if (StandByToken(args)) to = token;
    sums.Write(static_cast<char*>(args.partials) + to * row_bytes, hidden);
  }
}

// A rank's blocks share the receive list. Each takes entries that are the first of
// their token and, unless all have a sum, not the last; its threads wait nowhere for
// each other.
template <typename E, int count>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    SumPartialsKernel(const __grid_constant__ ArgsWithWeights first) {
  const PartialSumsArgs args = first.OfStacked(blockIdx.x);
  const std::int64_t entries = std::clamp<std::int64_t>(
      WarpTotal(args.recv_counts, args.num_ranks), 0, args.capacity);
  for (std::int64_t entry = blockIdx.y; entry < entries; entry += gridDim.y) {
    const std::int32_t token = TokenOf(args, entry);
    if (token == kNoToken) continue;
    if (entry > 0 && TokenOf(args, entry - 1) == token) continue;
    std::int64_t end = entry + 1;
    while (end < entries && TokenOf(args, end) == token) ++end;
    if (end == entry + 1 && !args.all) continue;
    SumEntries<E, count>(args, token, entry, end);
  }
}

}  // namespace

cudaError_t SumPartials(const PartialSumsArgs& args, std::int64_t num_stacked,
                        cudaStream_t stream) {
  if (args.hidden * ByteWidth(args.dtype) > kMaxRowBytes) return cudaErrorInvalidValue;
  if (args.hidden == 0) return cudaSuccess;
  return VisitElements(args.dtype, args.hidden, [&](auto e, auto count) {
    const std::int64_t loads = args.hidden / count();
    constexpr std::int64_t kLoadsOfWarp = kLoadsInFlight * kWarpSize;
    const std::int64_t warps = (loads + kLoadsOfWarp - 1) / kLoadsOfWarp;
    const int threads =
        static_cast<int>(std::min<std::int64_t>(warps, kWarps)) * kWarpSize;
    return LaunchStacked<SumPartialsKernel<decltype(e), count()>>(
        args, num_stacked, args.capacity, 1, threads, stream);
  });
}

}  // namespace jax_ep::cuda
