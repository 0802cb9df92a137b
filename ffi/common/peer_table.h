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
  // `addresses`, of one buffer per rank, lies in the memory of the host. A kernel on
  // the CPU reads it while it runs. One on a GPU reads a copy that travels with its
  // launch: `addresses` may go when the function that launches it has returned. The
  // buffers must be readable where the kernel runs.
  EP_HOST_DEVICE explicit PeerTable(const void* const* addresses)
      : addresses_(addresses), bytes_between_(kAnywhere) {}
  EP_HOST_DEVICE PeerTable(const void* first, std::int64_t bytes_between)
      : first_(static_cast<const char*>(first)), bytes_between_(bytes_between) {}

  EP_HOST_DEVICE const void* operator[](std::int64_t rank) const {
    return has_addresses() ? addresses_[rank] : first_ + rank * bytes_between_;
  }

  // Whether it consists of addresses, and these.
  EP_HOST_DEVICE bool has_addresses() const { return bytes_between_ == kAnywhere; }
  EP_HOST_DEVICE const void* const* addresses() const { return addresses_; }

  // Has it read its addresses, if it consists of such, in another place.
  EP_HOST_DEVICE void MoveAddresses(const void* const* to) { addresses_ = to; }

 private:
  static constexpr std::int64_t kAnywhere = -1;

  const void* const* addresses_ = nullptr;
  const char* first_ = nullptr;
  std::int64_t bytes_between_ = 0;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_PEER_TABLE_H_
