// Sizes of warps and blocks, and how every kernel here is launched.

#ifndef JAX_EP_FFI_CUDA_LAUNCH_H_
#define JAX_EP_FFI_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/peers.h"

namespace jax_ep::cuda {

// Kernels with large bodies state a minimum of one block in their launch bounds. Left
// unstated, ptxas spills registers to fit more blocks.

inline constexpr int kWarpSize = 32;
inline constexpr int kWarps = 8;  // of a block, unless a kernel says otherwise
inline constexpr int kThreads = kWarps * kWarpSize;

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

// Launches a kernel whose blocks share the `items` of each stacked rank, at least
// `per_block` at a time: as many blocks as the device runs at once, each of which works
// until nothing is left, or fewer where there is less. Blocks of all ranks are
// neighbours. They come to the same tokens at about the same time, so that what one
// rank read is still in the cache for the others.
template <typename ArgsWithPeers>
cudaError_t LaunchStacked(void (*kernel)(ArgsWithPeers),
                          const typename ArgsWithPeers::Args& args,
                          std::int64_t num_stacked, std::int64_t items,
                          std::int64_t per_block, int threads, cudaStream_t stream) {
  if (num_stacked == 0) return cudaSuccess;
  ArgsWithPeers first;
  if (!first.Pack(args, args.num_ranks)) return cudaErrorInvalidValue;
  int device = 0;
  int processors = 0;
  int blocks_each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, threads, 0);
  if (error != cudaSuccess) return error;
  constexpr std::int64_t kMaxBlocks = 65535;  // in the grid's second dimension
  const std::int64_t wanted = (items + per_block - 1) / per_block;
  const std::int64_t fill =
      (std::int64_t{processors} * blocks_each + num_stacked - 1) / num_stacked;
  const std::int64_t blocks = std::min({wanted, fill, kMaxBlocks});
  return Launch(kernel,
                dim3(static_cast<unsigned>(num_stacked), static_cast<unsigned>(blocks)),
                threads, stream, first);
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_LAUNCH_H_
