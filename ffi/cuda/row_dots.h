// The GPU's kernel of the gradient of `combine` in its weights, for the handlers.

#ifndef JAX_EP_FFI_CUDA_ROW_DOTS_H_
#define JAX_EP_FFI_CUDA_ROW_DOTS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "common/row_dots.h"

namespace jax_ep::cuda {

// Multiplies the rows of `num_stacked` ranks' choices with their tokens' rows of
// `dout`; these are the first rank's arguments.
cudaError_t RowDots(const RowDotsArgs& args, std::int64_t num_stacked,
                    cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_ROW_DOTS_H_
