// Stands in for CUDA's header where a test runs kernels for GPUs on the CPU.

#ifndef JAX_EP_TESTS_NATIVE_CUDA_EMULATION_CUDA_RUNTIME_H_
#define JAX_EP_TESTS_NATIVE_CUDA_EMULATION_CUDA_RUNTIME_H_

// The part of CUDA that our kernels use, on the CPU. Stands in for the header of that
// name, so that tests run the kernels as they are, without a GPU and without nvcc.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>

#include "grid.h"
#include "intrinsics.h"
#include "streams.h"
#include "vector_types.h"

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Blocks of a device run one after the other and find what the one before left behind.
#define __shared__ static thread_local

using std::max;
using std::min;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

namespace jax_ep::emulation {

// The CUDA version of the driver, and what comes of loading a kernel: for tests to
// alter.
inline int driver_version = CUDART_VERSION;
inline cudaError_t load_result = cudaSuccess;

}  // namespace jax_ep::emulation

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = jax_ep::emulation::driver_version;
  return cudaSuccess;
}

struct cudaFuncAttributes {};

template <typename... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Params...)) {
  return jax_ep::emulation::load_result;
}

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// A device so small that kernels whose blocks share the work go round their loops.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}

template <typename... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks,
                                                          void (*)(Params...), int,
                                                          std::size_t) {
  *blocks = 8;
  return cudaSuccess;
}

// Its arguments are copied at once, as CUDA does; it runs when its turn on the stream
// has come.
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                               void (*kernel)(Params...), Args&&... args) {
  constexpr unsigned kMaxThreads = 1024;
  constexpr unsigned kMaxBlocksY = 65535;
  const dim3 grid = config->gridDim;
  const dim3 block = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > kMaxBlocksY || grid.z != 1 ||
      block.x == 0 || block.x > kMaxThreads || block.y != 1 || block.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  const std::tuple<Params...> params(args...);
  return jax_ep::emulation::Enqueue(config->stream, [=] {
    const bool ended =
        jax_ep::emulation::RunGrid(grid, block, [&] { std::apply(kernel, params); });
    return ended ? cudaSuccess : cudaErrorLaunchFailure;
  });
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

inline void __syncthreads(
    std::source_location where = std::source_location::current()) {
  jax_ep::emulation::Meet({.name = "__syncthreads", .lanes = 0, .where = where});
}

inline void __syncwarp(unsigned mask = 0xffffffffU,
                       std::source_location where = std::source_location::current()) {
  jax_ep::emulation::Meet({.name = "__syncwarp", .lanes = mask, .where = where});
}

inline int __any_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  const auto values = jax_ep::emulation::Meet(
      {.name = "__any_sync", .lanes = mask, .where = where}, predicate != 0 ? 1 : 0);
  int any = 0;
  for (unsigned lane = 0; lane < jax_ep::emulation::kLanes; ++lane) {
    if ((mask >> lane & 1) != 0 && values[lane] != 0) any = 1;
  }
  return any;
}

namespace jax_ep::emulation {

template <typename T>
std::uint64_t BitsOf(T value) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}

// Gives each lane the value of the lane that `source(own lane)` names; its own one, if
// there is no such lane.
template <typename T, typename Source>
T Shuffle(const Collective& collective, T value, Source source) {
  const LaneValues values = Meet(collective, BitsOf(value));
  const unsigned from = source(OwnLane());
  const std::uint64_t bits =
      ValueOf(values, collective, from < kLanes ? from : OwnLane());
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace jax_ep::emulation

template <typename T>
unsigned __match_any_sync(
    unsigned mask, T value,
    std::source_location where = std::source_location::current()) {
  const std::uint64_t own = jax_ep::emulation::BitsOf(value);
  const auto values = jax_ep::emulation::Meet(
      {.name = "__match_any_sync", .lanes = mask, .where = where}, own);
  unsigned equals = 0;
  for (unsigned lane = 0; lane < jax_ep::emulation::kLanes; ++lane) {
    if ((mask >> lane & 1) != 0 && values[lane] == own) equals |= 1U << lane;
  }
  return equals;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source_lane,
              std::source_location where = std::source_location::current()) {
  return jax_ep::emulation::Shuffle(
      {.name = "__shfl_sync", .lanes = mask, .where = where}, value,
      [=](unsigned) { return static_cast<unsigned>(source_lane) % 32; });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes,
                 std::source_location where = std::source_location::current()) {
  return jax_ep::emulation::Shuffle(
      {.name = "__shfl_up_sync", .lanes = mask, .where = where}, value,
      [=](unsigned lane) { return lane - lanes; });
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes,
                   std::source_location where = std::source_location::current()) {
  return jax_ep::emulation::Shuffle(
      {.name = "__shfl_down_sync", .lanes = mask, .where = where}, value,
      [=](unsigned lane) { return lane + lanes; });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes,
                  std::source_location where = std::source_location::current()) {
  return jax_ep::emulation::Shuffle(
      {.name = "__shfl_xor_sync", .lanes = mask, .where = where}, value,
      [=](unsigned lane) { return lane ^ static_cast<unsigned>(lanes); });
}

#endif  // JAX_EP_TESTS_NATIVE_CUDA_EMULATION_CUDA_RUNTIME_H_
