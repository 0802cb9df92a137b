#include <cstdint>

#include "cuda/plan_tables.h"

namespace jax_ep {
namespace {

constexpr int kCutoffThreads = 1024;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

// Calls visit(priority) for all choices that go to `dest`, by a block.
template <typename Visit>
__device__ void ForEachIncoming(const PlanTables& tables, std::int64_t dest,
                                Visit visit) {
  const auto local = static_cast<std::int32_t>(tables.args.num_local_experts());
  for (std::int64_t source = 0; source < tables.args.num_ranks; ++source) {
    const std::int32_t* choices = tables.args.ChoicesOf(source);
    for (std::int64_t i = threadIdx.x; i < tables.args.choices_per_rank();
         i += blockDim.x) {
      const std::int32_t expert = LoadPeer(choices + i);
      if (expert != kDropped && expert / local == dest)
        visit(tables.Priority(source, i));
    }
  }
}

// A block per destination rank. One that is asked for more than it holds finds the
// priority of the first choice that does not fit, digit by digit: among the choices
// that share the digits found so far it counts how many have which digit next.
__global__ void __launch_bounds__(kCutoffThreads, 1)
    FindCutoffsKernel(PlanTables tables) {
  __shared__ std::int64_t incoming;
  __shared__ std::int32_t counts[kDigits];
  __shared__ std::int32_t prefix;
  __shared__ std::int64_t left;  // choices that fit beside those below the prefix
  const std::int64_t dest = blockIdx.x;
  const std::int64_t budget = tables.args.capacity - tables.args.num_local_experts() *
                                                         (tables.args.alignment - 1);
  if (WarpInBlock() == 0) {
    std::int64_t sum = 0;
    for (std::int64_t row = Lane(); row < tables.rows(); row += kWarpSize) {
      sum += tables.asked[row * tables.columns + tables.DestColumn(dest)];
    }
    sum = WarpSum(sum);
    if (Lane() == 0) incoming = sum;
  }
  if (threadIdx.x == 0) {
    prefix = 0;
    left = budget;
  }
  __syncthreads();
  if (incoming <= budget) {
    if (threadIdx.x == 0) tables.cutoff[dest] = kKeepAll;
    return;
  }
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int digit = static_cast<int>(threadIdx.x); digit < kDigits;
         digit += kCutoffThreads) {
      counts[digit] = 0;
    }
    __syncthreads();
    const std::int64_t found = prefix;
    ForEachIncoming(tables, dest, [&](std::int32_t priority) {
      const std::int64_t above =
          static_cast<std::int64_t>(priority) >> (shift + kDigitBits);
      if (above == found) atomicAdd(counts + ((priority >> shift) & (kDigits - 1)), 1);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 0;
      while (counts[digit] <= left) left -= counts[digit++];
      prefix = static_cast<std::int32_t>(found << kDigitBits) | digit;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) tables.cutoff[dest] = prefix;
}

}  // namespace

cudaError_t FindCutoffs(const PlanTables& tables, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(tables.args.num_ranks));
  return Launch(FindCutoffsKernel, blocks, kCutoffThreads, stream, tables);
}

}  // namespace jax_ep
