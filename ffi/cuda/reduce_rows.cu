// Adds up tokens' rows on a GPU: one warp finds the rows, and its block adds them.

#include <algorithm>
#include <cstdint>

#include "common/dropped.h"
#include "common/partial_sums.h"
#include "common/plan_bounds.h"
#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/peers.h"
#include "cuda/reduce_rows.h"

namespace jax_ep::cuda {
namespace {

using ArgsWithRows =
    WithPeers<ReduceRowsArgs, &ReduceRowsArgs::rows, &ReduceRowsArgs::partials>;

constexpr int kLoadsInFlight = 4;

// Blocks that a processor shall hold.
constexpr int kBlocksEach = 4;

// A token's rows by ascending (rank, k).
struct Terms {
  const void* row[kMaxTopk];
  float weight[kMaxTopk];
  std::int32_t rank[kMaxTopk];
  bool ends_rank[kMaxTopk];  // whether the next term is of another rank
  bool ends_node[kMaxTopk];
  int count;
};

// Lists token t's terms, by one warp: each lane finds the places of its choices.
__device__ void ListTerms(const ReduceRowsArgs& args, std::int64_t t, Terms& terms) {
  const std::int64_t row_bytes = args.hidden * ByteWidth(args.dtype);
  const auto topk = static_cast<int>(args.num_topk);
  const std::int64_t first = t * args.num_topk;
  int count = 0;
#pragma unroll 1
  for (int begin = 0; begin < topk; begin += kWarpSize) {
    const int k = begin + Lane();
    const bool has_row = k < topk && HasRow(args, first + k);
    const std::int32_t rank = has_row ? args.send_rank[first + k] : kDropped;
    int place = 0;
#pragma unroll 1
    for (int other = 0; other < topk; other += kWarpSize) {
      const int j = other + Lane();
      const bool is_there = j < topk && HasRow(args, first + j);
      const std::int32_t theirs = is_there ? args.send_rank[first + j] : kDropped;
      for (int lane = 0; lane < min(kWarpSize, topk - other); ++lane) {
        const std::int32_t r = __shfl_sync(kAllLanes, theirs, lane);
        if (r == kDropped) continue;
        place += r < rank || (r == rank && other + lane < k) ? 1 : 0;
      }
    }
    if (!has_row) continue;
    terms.row[place] = static_cast<const char*>(args.rows[rank]) +
                       args.send_row[first + k] * row_bytes;
    terms.weight[place] = args.weights == nullptr ? 1.0F : args.weights[first + k];
    terms.rank[place] = rank;
    ++count;
  }
  count = static_cast<int>(WarpSum(count));
  if (Lane() == 0) terms.count = count;
}

// The partial sum of token t that a rank lends, whose first row there is `row`.
__device__ const void* PartialSum(const ReduceRowsArgs& args, std::int64_t t,
                                  std::int32_t rank, const char* row) {
  const auto* partials = static_cast<const char*>(args.partials[rank]);
  if (!StandByToken(args)) {
    return partials + (row - static_cast<const char*>(args.rows[rank]));
  }
  return partials + (args.first_token + t) * args.hidden * ByteWidth(args.dtype);
}

// Of a rank's several terms of token t keeps one, the partial sum that it lends. By one
// warp.
__device__ void MergeTerms(const ReduceRowsArgs& args, std::int64_t t, Terms& terms) {
  __syncwarp();
  const int count = terms.count;
  std::int32_t before = kDropped;  // the rank of the term before this warp's next ones
  int merged = 0;
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kWarpSize) {
    const int i = begin + Lane();
    const std::int32_t rank = i < count ? terms.rank[i] : kDropped;
    const bool has_more = i + 1 < count && terms.rank[i + 1] == rank;
    const auto* row = i < count ? static_cast<const char*>(terms.row[i]) : nullptr;
    const float weight = i < count ? terms.weight[i] : 0.0F;
    std::int32_t previous = __shfl_up_sync(kAllLanes, rank, 1);
    if (Lane() == 0) previous = before;
    before = __shfl_sync(kAllLanes, rank, kWarpSize - 1);
    const bool is_first = i < count && rank != previous;
    const int end = merged + static_cast<int>(WarpScan(is_first ? 1 : 0));
    __syncwarp();  // All have read what these places held; none is above i.
    if (is_first) {
      const bool is_summed = has_more || args.pulled == Pulled::kSums;
      terms.row[end - 1] = is_summed ? PartialSum(args, t, rank, row) : row;
      terms.weight[end - 1] = is_summed ? 1.0F : weight;
      terms.rank[end - 1] = rank;
    }
    merged = __shfl_sync(kAllLanes, end, kWarpSize - 1);
  }
  if (Lane() == 0) terms.count = merged;
}

// Finds out after which terms a rank ends, and a node. By one warp.
__device__ void MarkEnds(const ReduceRowsArgs& args, Terms& terms) {
  __syncwarp();
  const auto per_node = static_cast<std::int32_t>(args.ranks_per_node);
  const int count = terms.count;
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kWarpSize) {
    const int i = begin + Lane();
    if (i >= count) break;
    const bool is_last = i + 1 == count;
    const std::int32_t rank = terms.rank[i];
    const std::int32_t next = is_last ? rank : terms.rank[i + 1];
    terms.ends_rank[i] = is_last || next != rank;
    terms.ends_node[i] = is_last || next / per_node != rank / per_node;
  }
}

// Adds up `count` elements of a token, from `first` on. Each rank's terms go into a
// partial sum that is rounded as it would be to cross a wire; these into one of their
// node, likewise.
template <typename E, int count>
__device__ Elements<E, count> Reduce(const Terms& terms, int first) {
  using Sum = typename E::Sum;
  Sum total[count] = {};
  Sum of_node[count] = {};
  Sum partial[count] = {};
  for (int begin = 0; begin < terms.count; begin += kLoadsInFlight) {
    Elements<E, count> held[kLoadsInFlight];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      if (begin + j < terms.count) {
        held[j] = LoadElements<E, count>(terms.row[begin + j], first);
      }
    }
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int term = begin + j;
      if (term >= terms.count) break;
      const auto weight = static_cast<Sum>(terms.weight[term]);
      const bool ends_rank = terms.ends_rank[term];
      const bool ends_node = terms.ends_node[term];
#pragma unroll
      for (int i = 0; i < count; ++i) {
        partial[i] = Fma(weight, Load<E>(held[j].at[i]), partial[i]);
        if (ends_rank) {
          of_node[i] += RoundSum<E>(partial[i]);
          partial[i] = 0;
        }
        if (ends_node) {
          total[i] += RoundSum<E>(of_node[i]);
          of_node[i] = 0;
        }
      }
    }
  }
  Elements<E, count> out;
#pragma unroll
  for (int i = 0; i < count; ++i) out.at[i] = Round<E>(total[i]);
  return out;
}

// Elements of a row: a block's part of it.
struct Part {
  int begin;
  int end;
};

// Into how many parts rows are cut where there are more blocks than tokens: at most as
// many as there are turns, in each of which a block adds up `step` elements.
__device__ int PartsOf(const ReduceRowsArgs& args, int step) {
  const int turns = (static_cast<int>(args.hidden) + step - 1) / step;
  const std::int64_t blocks = gridDim.y;
  const auto each = static_cast<int>(blocks / args.num_tokens);
  return max(min(each, turns), 1);
}

// This block's, of so many parts that consist of whole turns.
__device__ Part OwnPart(const ReduceRowsArgs& args, int parts, int step) {
  const auto hidden = static_cast<int>(args.hidden);
  const int turns = (hidden + step - 1) / step;
  const int size = (turns + parts - 1) / parts * step;
  const int begin = static_cast<int>(blockIdx.y) % parts * size;
  return {begin, min(begin + size, hidden)};
}

// A block per token at a time, whose threads share the elements. Where blocks have a
// part of a token each, none has a second.
template <typename E, int count>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    ReduceRowsKernel(const __grid_constant__ ArgsWithRows first) {
  const ReduceRowsArgs args = first.OfStacked(blockIdx.x);
  __shared__ Terms terms;
  const int step = static_cast<int>(blockDim.x) * count;
  const int parts = PartsOf(args, step);
  const Part part = OwnPart(args, parts, step);
  for (std::int64_t t = static_cast<int>(blockIdx.y) / parts; t < args.num_tokens;
       t += gridDim.y) {
    if (WarpInBlock() == 0) {
      ListTerms(args, t, terms);
      if (args.pulled != Pulled::kRows) MergeTerms(args, t, terms);
      MarkEnds(args, terms);
    }
    __syncthreads();
    char* out = static_cast<char*>(args.out) + t * args.hidden * ByteWidth(args.dtype);
    for (int h = part.begin + static_cast<int>(threadIdx.x) * count; h < part.end;
         h += step) {
      StoreElements<E, count>(out, h, Reduce<E, count>(terms, h));
    }
    __syncthreads();
  }
}

// Returns how many warps a block shall have for rows of so many steps of a warp: as
// many as there are steps, or one of the numbers of which blocks fill a processor, the
// one that has fewer warps idle in the last turn.
std::int64_t WarpsFor(std::int64_t steps) {
  constexpr std::int64_t kFewer = kWarps / 2;
  const auto idle = [&](std::int64_t warps) {
    return (steps + warps - 1) / warps * warps - steps;
  };
  if (steps <= kWarps) return steps;
  return idle(kFewer) < idle(kWarps) ? kFewer : kWarps;
}

}  // namespace

cudaError_t ReduceRows(const ReduceRowsArgs& args, std::int64_t num_stacked,
                       cudaStream_t stream) {
  if (args.num_topk > kMaxTopk) return cudaErrorInvalidValue;
  if (args.hidden * ByteWidth(args.dtype) > kMaxRowBytes) return cudaErrorInvalidValue;
  if (args.hidden == 0) return cudaSuccess;
  return VisitElements(args.dtype, args.hidden, [&](auto e, auto count) {
    const std::int64_t loads = args.hidden / count();
    const std::int64_t steps = (loads + kWarpSize - 1) / kWarpSize;
    const std::int64_t warps = WarpsFor(steps);
    const std::int64_t parts = (steps + warps - 1) / warps;
    return LaunchStacked<ReduceRowsKernel<decltype(e), count()>>(
        args, num_stacked, args.num_tokens * parts, 1,
        static_cast<int>(warps) * kWarpSize, stream);
  });
}

}  // namespace jax_ep::cuda
