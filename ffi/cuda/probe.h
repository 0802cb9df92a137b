// Whether a device runs what this library was compiled for.

#ifndef JAX_EP_FFI_CUDA_PROBE_H_
#define JAX_EP_FFI_CUDA_PROBE_H_

#include <cuda_runtime.h>

namespace jax_ep::cuda {

// Loads a kernel onto the current device, without running it.
cudaError_t Probe();

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PROBE_H_
