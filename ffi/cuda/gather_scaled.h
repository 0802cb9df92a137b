// The GPU's kernel of the gradient of `combine`, for the handlers.

#ifndef JAX_EP_FFI_CUDA_GATHER_SCALED_H_
#define JAX_EP_FFI_CUDA_GATHER_SCALED_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "common/gather_rows.h"

namespace jax_ep::cuda {

// Fills the rows of `num_stacked` ranks, of which these are the first one's arguments,
// with their tokens, each scaled by its choice's weight.
cudaError_t GatherScaled(const GatherRowsArgs& args, std::int64_t num_stacked,
                         cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_GATHER_SCALED_H_
