// How kernels reach other ranks. Callers who know where those are make it.

#ifndef JAX_EP_FFI_COMMON_PEER_TABLE_H_
#define JAX_EP_FFI_COMMON_PEER_TABLE_H_

#include <cstdint>

#include "common/host_device.h"

namespace jax_ep {

// One buffer of each rank: all that a kernel knows of the rank's peers. They lie
// anywhere, or one after the other.
class PeerTable {
 public:
  PeerTable() = default;
  // `buffers` must be readable where the kernel runs: on a GPU, by the GPU.
  EP_HOST_DEVICE explicit PeerTable(const void* const* buffers) : buffers_(buffers) {}
  EP_HOST_DEVICE PeerTable(const void* first, std::int64_t bytes_between)
      : first_(static_cast<const char*>(first)), bytes_between_(bytes_between) {}

  EP_HOST_DEVICE const void* operator[](std::int64_t rank) const {
    return buffers_ != nullptr ? buffers_[rank] : first_ + rank * bytes_between_;
  }

 private:
  const void* const* buffers_ = nullptr;
  const char* first_ = nullptr;
  std::int64_t bytes_between_ = 0;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_PEER_TABLE_H_
