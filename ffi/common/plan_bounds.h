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

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_PLAN_BOUNDS_H_
