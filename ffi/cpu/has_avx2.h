// Whether this CPU runs what is compiled for x86-64-v3's vectors.

#ifndef JAX_EP_FFI_CPU_HAS_AVX2_H_
#define JAX_EP_FFI_CPU_HAS_AVX2_H_

namespace jax_ep::cpu {

// Tells whether it has AVX2 and fused multiply-adds, and the system saves their
// registers. False on other processors than x86-64.
bool HasAvx2();

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_HAS_AVX2_H_
