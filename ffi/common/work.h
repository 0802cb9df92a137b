// The work that a kernel for CPUs makes of its arguments, cut into chunks: what kernels
// hand to fabrics, which run it.

#ifndef JAX_EP_FFI_COMMON_WORK_H_
#define JAX_EP_FFI_COMMON_WORK_H_

#include <cstdint>

namespace jax_ep {

// One rank's share of an exchange, cut into chunks that any threads may run, in any
// order and at the same time, once the peers' buffers are ready. Kernels make it;
// fabrics run it, with floating point as IEEE 754 says.
struct Work {
  const void* args = nullptr;  // the op's Args
  void (*run)(const void* args, std::int64_t chunk) = nullptr;
  std::int64_t num_chunks = 0;
};

// Bytes that a chunk moves: long enough to hide handing it out, short enough to share
// the work of one rank evenly.
inline constexpr std::int64_t kChunkBytes = 256 * 1024;

// Returns how many items of `item_bytes` make a chunk, at least one.
constexpr std::int64_t ItemsPerChunk(std::int64_t item_bytes) {
  return item_bytes < kChunkBytes / 2 ? kChunkBytes / (item_bytes + 1) + 1 : 1;
}

constexpr std::int64_t CeilDiv(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_WORK_H_
