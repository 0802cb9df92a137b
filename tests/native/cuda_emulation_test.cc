// The emulation's own tests: the kernels' tests say nothing if it lets mistakes pass.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"

namespace jax_ep {
namespace {

constexpr unsigned kAll = 0xffffffffU;

template <typename... Args>
cudaError_t Launch(void (*kernel)(Args...), dim3 blocks, unsigned threads,
                   std::type_identity_t<Args>... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Whether the launch fails for a reason that has all of these words in it.
bool FailsFor(cudaError_t error, const std::vector<std::string>& words) {
  const auto is_said = [](const std::string& word) {
    return emulation::Failure().find(word) != std::string::npos;
  };
  return error == cudaErrorLaunchFailure && std::ranges::all_of(words, is_said);
}

__global__ void NumberThreads(unsigned* numbers) {
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
  numbers[block * blockDim.x + threadIdx.x] +=
      1000 * blockIdx.y + 100 * blockIdx.x + threadIdx.x;
}

EP_TEST(EveryThreadRunsOnce) {
  std::vector<unsigned> numbers(2 * 3 * 50);
  EP_CHECK_EQ(Launch(NumberThreads, dim3(3, 2), 50, numbers.data()), cudaSuccess);
  for (unsigned i = 0; i < numbers.size(); ++i) {
    EP_CHECK_EQ(numbers[i], i / 150 * 1000 + i / 50 % 3 * 100 + i % 50);
  }
}

EP_TEST(RefusesWhatADeviceRefuses) {
  unsigned number = 0;
  EP_CHECK_EQ(Launch(NumberThreads, dim3(0), 32, &number),
              cudaErrorInvalidConfiguration);
  EP_CHECK_EQ(Launch(NumberThreads, dim3(1), 1025, &number),
              cudaErrorInvalidConfiguration);
  EP_CHECK_EQ(number, 0U);
}

// What each lane gets of what all lanes bring.
struct LaneResults {
  int shuffled;
  int from_below;
  int from_above;
  double crossed;
  unsigned equals;
  int any;
  int none;
};

__global__ void AskOtherLanes(LaneResults* results) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int value = 100 + lane;
  LaneResults& own = results[threadIdx.x];
  own.shuffled = __shfl_sync(kAll, value, 7);
  own.from_below = __shfl_up_sync(kAll, value, 4);
  own.from_above = __shfl_down_sync(kAll, value, 4);
  own.crossed = __shfl_xor_sync(kAll, value + 0.5, 16);
  own.equals = __match_any_sync(kAll, lane % 3);
  own.any = __any_sync(kAll, threadIdx.x == 40 ? 1 : 0);
  own.none = __any_sync(kAll, 0);
}

EP_TEST(LanesGetEachOthersValues) {
  std::vector<LaneResults> results(64);
  EP_CHECK_EQ(Launch(AskOtherLanes, dim3(1), 64, results.data()), cudaSuccess);
  for (int i = 0; i < 64; ++i) {
    const LaneResults& own = results[static_cast<std::size_t>(i)];
    const int lane = i % 32;
    EP_CHECK_EQ(own.shuffled, 107);
    EP_CHECK_EQ(own.from_below, 100 + (lane < 4 ? lane : lane - 4));
    EP_CHECK_EQ(own.from_above, 100 + (lane > 27 ? lane : lane + 4));
    EP_CHECK_EQ(own.crossed, 100.5 + (lane ^ 16));
    for (int other = 0; other < 32; ++other) {
      EP_CHECK_EQ(own.equals >> other & 1, other % 3 == lane % 3 ? 1U : 0U);
    }
    EP_CHECK_EQ(own.any, i < 32 ? 0 : 1);
    EP_CHECK_EQ(own.none, 0);
  }
}

// Halves of each warp meet apart from each other, and more often in the lower ones.
__global__ void MeetInHalves(int* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned half = lane < 16 ? 0x0000ffffU : 0xffff0000U;
  int sum = lane;
  for (int lanes = lane < 16 ? 8 : 1; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(half, sum, lanes);
  }
  sums[threadIdx.x] = sum;
}

EP_TEST(PartsOfAWarpMeet) {
  std::vector<int> sums(32);
  EP_CHECK_EQ(Launch(MeetInHalves, dim3(1), 32, sums.data()), cudaSuccess);
  for (int lane = 0; lane < 32; ++lane) {
    EP_CHECK_EQ(sums[static_cast<std::size_t>(lane)],
                lane < 16 ? 15 * 16 / 2 : lane + (lane ^ 1));
  }
}

// Passes numbers round the block through shared memory, with or without barriers.
template <bool has_barrier>
__global__ void PassOn(unsigned* numbers) {
  __shared__ unsigned passed[256];
  unsigned number = threadIdx.x;
  for (unsigned round = 0; round < 4; ++round) {
    passed[(threadIdx.x + 1) % blockDim.x] = number;
    if constexpr (has_barrier) __syncthreads();
    number = passed[threadIdx.x];
    if constexpr (has_barrier) __syncthreads();
  }
  numbers[threadIdx.x] = number;
}

template <bool has_barrier>
bool PassesOnRightly(std::uint64_t seed) {
  emulation::SetSeed(seed);
  std::vector<unsigned> numbers(256);
  EP_CHECK_EQ(Launch(PassOn<has_barrier>, dim3(1), 256, numbers.data()), cudaSuccess);
  for (unsigned i = 0; i < 256; ++i) {
    if (numbers[i] != (i + 256 - 4) % 256) return false;
  }
  return true;
}

EP_TEST(MissingBarriersShow) {
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    EP_CHECK(PassesOnRightly<true>(seed));
    EP_CHECK(!PassesOnRightly<false>(seed));
  }
}

__global__ void AddUp(int* sum) { atomicAdd(sum, static_cast<int>(threadIdx.x)); }

EP_TEST(AdditionsAddUp) {
  int sum = 0;
  EP_CHECK_EQ(Launch(AddUp, dim3(3), 100, &sum), cudaSuccess);
  EP_CHECK_EQ(sum, 3 * 99 * 100 / 2);
}

__global__ void LeaveBeforeBarrier() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void LeaveBeforeShuffle() {
  if (threadIdx.x == 33) return;
  __shfl_xor_sync(kAll, 1, 16);
}

__global__ void DifferInMask() { __syncwarp(threadIdx.x == 3 ? 0x0fU : kAll); }

__global__ void DifferInPlace() {
  if (threadIdx.x % 2 == 0) __syncthreads();
  if (threadIdx.x % 2 != 0) __syncthreads();
}

__global__ void DifferInCollective() {
  if (threadIdx.x < 8) {
    __syncwarp();
  } else {
    __any_sync(kAll, 1);
  }
}

__global__ void LeaveSelfOut() { __syncwarp(0xfffffffeU); }

__global__ void AskOneLeftOut() {
  if (threadIdx.x < 16) __shfl_sync(0xffffU, 1, 20);
}

EP_TEST(SaysWhyThreadsHang) {
  EP_CHECK(FailsFor(Launch(LeaveBeforeBarrier, dim3(1), 64),
                    {"63 (thread ", "__syncthreads at ", "1 (thread 5 first) left"}));
  EP_CHECK(FailsFor(Launch(LeaveBeforeShuffle, dim3(1), 64),
                    {"31 (thread 32 first) in __shfl_xor_sync", "33 (thread "}));
  EP_CHECK(FailsFor(Launch(DifferInMask, dim3(1), 32),
                    {"of lanes 0xf\n", "of lanes 0xffffffff"}));
  EP_CHECK(FailsFor(Launch(DifferInPlace, dim3(1), 64),
                    {"32 (thread 0 first) in __syncthreads", "32 (thread 1 first)"}));
  EP_CHECK(
      FailsFor(Launch(DifferInCollective, dim3(1), 32),
               {"8 (thread 0 first) in __syncwarp", "24 (thread 8 first) in __any"}));
  EP_CHECK(FailsFor(Launch(LeaveSelfOut, dim3(1), 32),
                    {"thread 0: __syncwarp by a lane that its mask leaves out"}));
  EP_CHECK(FailsFor(Launch(AskOneLeftOut, dim3(1), 32),
                    {"__shfl_sync of lane 20, which its mask leaves out"}));
  std::vector<LaneResults> results(31);
  EP_CHECK(FailsFor(Launch(AskOtherLanes, dim3(1), 31, results.data()),
                    {"31 (thread 0 first) in __shfl_sync"}));
}

}  // namespace
}  // namespace jax_ep
