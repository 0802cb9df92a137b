#ifndef JAX_EP_FFI_CUDA_LAUNCH_H_
#define JAX_EP_FFI_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace jax_ep {

// Kernels with large bodies state a minimum of one block in their launch bounds. Left
// unstated, ptxas spills registers to fit more blocks.

inline constexpr int kWarpSize = 32;
inline constexpr int kWarps = 8;  // of a block, unless a kernel says otherwise
inline constexpr int kThreads = kWarps * kWarpSize;

// Launches a kernel; returns what went wrong, which later launches do not hide.
template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), dim3 blocks, int threads,
                   cudaStream_t stream, Args... args) {
  if (blocks.x == 0 || blocks.y == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Returns how many blocks share `items` of work, `items_per_block` at a time: enough to
// fill the device, each working until nothing is left, or fewer where there is less.
inline unsigned BlocksFor(std::int64_t items, std::int64_t items_per_block,
                          std::int64_t sharing) {
  constexpr std::int64_t kBlocksPerProcessor = 8;
  int device = 0;
  int processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const std::int64_t wanted = (items + items_per_block - 1) / items_per_block;
  const std::int64_t fill = (processors * kBlocksPerProcessor + sharing - 1) /
                            std::max<std::int64_t>(sharing, 1);
  return static_cast<unsigned>(std::min(wanted, std::max<std::int64_t>(fill, 1)));
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_CUDA_LAUNCH_H_
