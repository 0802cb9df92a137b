// Floating-point modes of threads that run works.
// Set by work_share.h for every thread that runs chunks.

#ifndef JAX_EP_FFI_FABRIC_WORK_IEEE_H_
#define JAX_EP_FFI_FABRIC_WORK_IEEE_H_

#include <cstdint>

namespace jax_ep {

// Runs denormals and rounding as IEEE 754 says while it lives. XLA may have set its
// threads to flush denormals, and which thread runs a chunk must not show in results.
class ScopedIeee {
 public:
  ScopedIeee();
  ~ScopedIeee();
  ScopedIeee(const ScopedIeee&) = delete;
  ScopedIeee& operator=(const ScopedIeee&) = delete;

 private:
  std::uint64_t saved_;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_WORK_IEEE_H_
