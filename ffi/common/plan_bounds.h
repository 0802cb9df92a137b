// The checks of plans that the kernels on CPUs and on GPUs share.

#ifndef JAX_EP_FFI_COMMON_PLAN_BOUNDS_H_
#define JAX_EP_FFI_COMMON_PLAN_BOUNDS_H_

#include <cstdint>

#include "common/host_device.h"

namespace jax_ep {

// A plan's arrays come back from the user and may hold anything. Kernels ask of each
// number, as they use it, whether it is an index into what there is, and leave out what
// belongs to one that is not. On the CPU they say so too, see plan_fault.h; on a GPU
// nobody waits for them to whom they could.

// Whether a number that a plan holds is in [0, size).
EP_HOST_DEVICE constexpr bool IsIndex(std::int32_t number, std::int64_t size) {
  return static_cast<std::uint64_t>(std::int64_t{number}) <
         static_cast<std::uint64_t>(size);
}

// Whether a choice has a row on a rank: if both exist.
template <typename Args>
EP_HOST_DEVICE bool HasRow(const Args& args, std::int64_t choice) {
  return IsIndex(args.send_row[choice], args.capacity) &&
         IsIndex(args.send_rank[choice], args.num_ranks);
}

// In place of a token: there is none.
inline constexpr std::int32_t kNoToken = -1;

// The token that an entry of a receive list asks for, numbered through all ranks.
template <typename Args>
EP_HOST_DEVICE std::int32_t TokenOf(const Args& args, std::int64_t entry) {
  const std::int32_t choice = args.recv_choice[entry];
  if (!IsIndex(choice, args.num_ranks * args.num_tokens * args.num_topk)) {
    return kNoToken;
  }
  return choice / static_cast<std::int32_t>(args.num_topk);
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_PLAN_BOUNDS_H_
