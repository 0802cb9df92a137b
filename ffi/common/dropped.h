// The one number by which plans, kernels and tests say that something is not there.

#ifndef JAX_EP_FFI_COMMON_DROPPED_H_
#define JAX_EP_FFI_COMMON_DROPPED_H_

#include <cstdint>

namespace jax_ep {

// In place of an expert, a rank or a row: there is none.
inline constexpr std::int32_t kDropped = -1;

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_DROPPED_H_
