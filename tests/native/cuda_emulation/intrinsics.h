// Stands in for what kernels ask of the compiler and the device besides threads.

#ifndef JAX_EP_TESTS_NATIVE_CUDA_EMULATION_INTRINSICS_H_
#define JAX_EP_TESTS_NATIVE_CUDA_EMULATION_INTRINSICS_H_

#include <bit>
#include <source_location>

#include "grid.h"

// Every emulated thread has parameters of its own.
#define __grid_constant__

// Stores what is not read again soon.
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

// One more than the place of the lowest bit that is set; 0: there is none.
inline int __ffs(int bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1;
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    std::source_location where = std::source_location::current()) {
  const auto values = jax_ep::emulation::Meet(
      {.name = "__ballot_sync", .lanes = mask, .where = where}, predicate != 0 ? 1 : 0);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < jax_ep::emulation::kLanes; ++lane) {
    if ((mask >> lane & 1) != 0 && values[lane] != 0) ballot |= 1U << lane;
  }
  return ballot;
}

#endif  // JAX_EP_TESTS_NATIVE_CUDA_EMULATION_INTRINSICS_H_
