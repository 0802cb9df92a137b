// For the CPU's kernels that write much: how to get it into memory fast.

#ifndef JAX_EP_FFI_CPU_OUTPUT_PAGES_H_
#define JAX_EP_FFI_CPU_OUTPUT_PAGES_H_

#include <cstdint>

namespace jax_ep::cpu {

// Asks for huge pages under a large output before its first write. XLA hands out
// freshly mapped memory, and faulting it in by 4 KiB pages costs more than the copies.
// Small outputs are left alone: there clearing whole huge pages costs more than it
// saves. Has no effect where the kernel has transparent huge pages off.
void PrepareOutputPages(void* data, std::int64_t bytes);

// Tells whether an output of this size is written past the caches.
bool StreamsOutput(std::int64_t bytes);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_OUTPUT_PAGES_H_
