// The GPU's kernel of `combine` and of the gradient of `dispatch`, for the handlers.

#ifndef JAX_EP_FFI_CUDA_REDUCE_ROWS_H_
#define JAX_EP_FFI_CUDA_REDUCE_ROWS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "common/reduce_rows.h"

namespace jax_ep::cuda {

// Choices of a token that the kernel has room for.
inline constexpr std::int64_t kMaxTopk = 64;

// Adds up the rows of the tokens of `num_stacked` ranks, of which these are the first
// one's arguments.
cudaError_t ReduceRows(const ReduceRowsArgs& args, std::int64_t num_stacked,
                       cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_REDUCE_ROWS_H_
