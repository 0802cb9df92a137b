// A GPU's clock, written down by a stream.

#ifndef JAX_EP_FFI_CUDA_STAMP_H_
#define JAX_EP_FFI_CUDA_STAMP_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_ep::cuda {

// Has the stream write its GPU's clock, in nanoseconds, once all before is done. The
// host may look at the place at any time.
cudaError_t Stamp(std::int64_t* place, cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_STAMP_H_
