// The GPU's kernel of `dispatch`, for the handlers.

#ifndef JAX_EP_FFI_CUDA_GATHER_ROWS_H_
#define JAX_EP_FFI_CUDA_GATHER_ROWS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "common/gather_rows.h"

namespace jax_ep::cuda {

// Fills the rows of `num_stacked` ranks, of which these are the first one's arguments,
// with plain copies of their tokens.
cudaError_t GatherRows(const GatherRowsArgs& args, std::int64_t num_stacked,
                       cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_GATHER_ROWS_H_
