// What gather_rows.cu and gather_scaled.cu have in common.

#ifndef JAX_EP_FFI_CUDA_RECEIVED_H_
#define JAX_EP_FFI_CUDA_RECEIVED_H_

#include <cstdint>

#include "common/gather_rows.h"
#include "cuda/device.h"

namespace jax_ep::cuda {

// How much of one rank's receive list and rows is in use: at most what there is.
struct Received {
  std::int64_t entries;
  std::int64_t rows;
};

__device__ inline std::int64_t Clamp(std::int64_t value, std::int64_t highest) {
  return value < 0 ? 0 : value < highest ? value : highest;
}

// Called by all threads of a block.
__device__ inline Received ReceivedBy(const GatherRowsArgs& args) {
  __shared__ Received received;
  if (WarpInBlock() == 0) {
    const std::int64_t entries = WarpTotal(args.recv_counts, args.num_ranks);
    const std::int64_t rows = WarpTotal(args.group_sizes, args.num_local_experts);
    if (Lane() == 0) {
      received = {Clamp(entries, args.capacity), Clamp(rows, args.capacity)};
    }
  }
  __syncthreads();
  return received;
}

// Whose token it is, and which of theirs.
struct Source {
  std::int64_t rank;
  std::int64_t token;
};

__device__ inline Source SourceOf(const GatherRowsArgs& args, std::int32_t token) {
  const auto tokens = static_cast<std::int32_t>(args.num_tokens);
  return {token / tokens, token % tokens};
}

// Zeroes a row, by one warp.
template <typename Unit>
__device__ inline void ZeroRow(const GatherRowsArgs& args, std::int64_t row) {
  auto* to =
      reinterpret_cast<Unit*>(static_cast<char*>(args.rows) + row * args.row_bytes);
  const std::int64_t units = args.row_bytes / static_cast<std::int64_t>(sizeof(Unit));
  for (std::int64_t u = Lane(); u < units; u += kWarpSize) to[u] = Unit{};
}

// Zeroes what no choice fills: the padding inside groups and, where it is to be zero,
// the tail. All warps of the rank do their share.
template <typename Unit>
__device__ inline void ZeroUnfilled(const GatherRowsArgs& args,
                                    std::int64_t used_rows) {
  const std::int64_t warp = WarpOfRank();
  const std::int64_t warps = WarpsOfRank();
  for (std::int64_t e = warp; e < args.num_local_experts; e += warps) {
    if (args.group_rows[e] == args.group_sizes[e]) continue;
    const std::int64_t start = WarpTotal(args.group_sizes, e);
    const std::int64_t end = Clamp(start + args.group_sizes[e], args.capacity);
    for (std::int64_t row = Clamp(start + args.group_rows[e], args.capacity); row < end;
         ++row) {
      ZeroRow<Unit>(args, row);
    }
  }
  if (!args.zero_tail) return;
  for (std::int64_t row = used_rows + warp; row < args.capacity; row += warps) {
    ZeroRow<Unit>(args, row);
  }
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_RECEIVED_H_
