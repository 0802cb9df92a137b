// How a table of peers' addresses comes to a kernel: as part of its parameters.

#ifndef JAX_EP_FFI_CUDA_PEERS_H_
#define JAX_EP_FFI_CUDA_PEERS_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/peer_table.h"

namespace jax_ep::cuda {

// Ranks whose buffers may lie anywhere. Parameters hold 4 KiB on every GPU.
inline constexpr std::int64_t kMaxPeers = 64;

// The arguments of a kernel, and behind them what those of its tables hold that are
// arrays of addresses: nobody needs to keep these arrays until the kernel runs, nor to
// copy them to the GPU. Kernels take it as a __grid_constant__, and so read it where
// parameters lie. Of tables with a stride nothing is copied or read here.
template <typename KernelArgs, PeerTable KernelArgs::*... kTables>
class WithPeers {
 public:
  using Args = KernelArgs;

  // By the host. Returns whether there is room for the addresses.
  bool Pack(const Args& args, std::int64_t num_ranks) {
    first_ = args;
    if (!((args.*kTables).has_addresses() || ...)) return true;
    if (num_ranks > kMaxPeers) return false;
    const void** to = addresses_;
    const auto copy = [&](const PeerTable& table) {
      if (table.has_addresses()) std::copy_n(table.addresses(), num_ranks, to);
      to += kMaxPeers;
    };
    (copy(args.*kTables), ...);
    return true;
  }

  // What a block of the i-th stacked rank works on.
  __device__ Args OfStacked(std::int64_t i) const { return Bound(first_.OfStacked(i)); }

  // The arguments, whose tables find the addresses here.
  __device__ Args Bound() const { return Bound(first_); }

 private:
  __device__ Args Bound(Args args) const {
    int table = 0;
    ((args.*kTables).MoveAddresses(addresses_ + kMaxPeers * table++), ...);
    return args;
  }

  Args first_;
  const void* addresses_[sizeof...(kTables) * kMaxPeers];
};

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PEERS_H_
