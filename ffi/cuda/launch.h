// Sizes of warps and blocks, and how every kernel here is launched.

#ifndef JAX_EP_FFI_CUDA_LAUNCH_H_
#define JAX_EP_FFI_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

#include "cuda/peers.h"

namespace jax_ep::cuda {

// Kernels with large bodies state a minimum of one block in their launch bounds. Left
// unstated, ptxas spills registers to fit more blocks.

inline constexpr int kWarpSize = 32;
inline constexpr int kWarps = 8;  // of a block, unless a kernel says otherwise
inline constexpr int kThreads = kWarps * kWarpSize;
inline constexpr int kMaxThreads = 1024;  // of a block, on every GPU

// Within a row kernels count in 32 bits.
inline constexpr std::int64_t kMaxRowBytes = std::numeric_limits<std::int32_t>::max();

// The parameters of a kernel that has one.
template <typename Params>
Params ParamsOfKernel(void (*kernel)(Params));
template <auto kKernel>
using ParamsOf = decltype(ParamsOfKernel(kKernel));

// Launches a kernel; returns what went wrong, which later launches do not hide.
template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), dim3 blocks, int threads,
                   cudaStream_t stream, const Args&... args) {
  if (blocks.x == 0 || blocks.y == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Finds how many blocks of a kernel the current device runs at once. That does not
// change: each device is asked once.
template <auto kKernel>
cudaError_t CountResidentBlocks(int threads, std::int64_t* blocks) {
  constexpr int kDevices = 64;  // of those above nothing is kept
  static std::atomic<std::int64_t> known[kDevices][kMaxThreads / kWarpSize];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::atomic<std::int64_t>* kept =
      device < kDevices ? &known[device][(threads - 1) / kWarpSize] : nullptr;
  *blocks = kept != nullptr ? kept->load(std::memory_order_relaxed) : 0;
  if (*blocks > 0) return cudaSuccess;
  int processors = 0;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  int each = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, threads, 0);
  if (error != cudaSuccess) return error;
  *blocks = std::int64_t{processors} * each;
  if (kept != nullptr) kept->store(*blocks, std::memory_order_relaxed);
  return cudaSuccess;
}

// Launches a kernel whose blocks share the `items` of each stacked rank, at least
// `per_block` at a time: no more blocks than the device runs at once, each of which
// works until nothing is left. One that had to wait for others to end would do its
// whole share alone. Blocks of all ranks are neighbours. They come to the same tokens
// at about the same time, so that what one rank read is still in the cache for the
// others.
template <auto kKernel, typename Args>
cudaError_t LaunchStacked(const Args& args, std::int64_t num_stacked,
                          std::int64_t items, std::int64_t per_block, int threads,
                          cudaStream_t stream) {
  if (num_stacked == 0) return cudaSuccess;
  ParamsOf<kKernel> first;
  if (!first.Pack(args, args.num_ranks)) return cudaErrorInvalidValue;
  std::int64_t resident = 0;
  const cudaError_t error = CountResidentBlocks<kKernel>(threads, &resident);
  if (error != cudaSuccess) return error;
  constexpr std::int64_t kMaxBlocks = 65535;  // in the grid's second dimension
  const std::int64_t wanted = (items + per_block - 1) / per_block;
  const std::int64_t fill = std::max<std::int64_t>(resident / num_stacked, 1);
  const std::int64_t blocks = std::min({wanted, fill, kMaxBlocks});
  return Launch(kKernel,
                dim3(static_cast<unsigned>(num_stacked), static_cast<unsigned>(blocks)),
                threads, stream, first);
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_LAUNCH_H_
