// The GPU's kernel that spares `combine` rows on the wire, for the handlers.

#ifndef JAX_EP_FFI_CUDA_PARTIAL_SUMS_H_
#define JAX_EP_FFI_CUDA_PARTIAL_SUMS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "common/partial_sums.h"

namespace jax_ep::cuda {

// Adds up the rows that `num_stacked` ranks hold of one token each, of which these are
// the first one's arguments.
cudaError_t SumPartials(const PartialSumsArgs& args, std::int64_t num_stacked,
                        cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PARTIAL_SUMS_H_
