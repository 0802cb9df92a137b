// The GPU's kernel that encodes rows, for the handlers.

#ifndef JAX_EP_FFI_CUDA_ENCODE_ROWS_H_
#define JAX_EP_FFI_CUDA_ENCODE_ROWS_H_

#include <cuda_runtime.h>

#include "common/encode_rows.h"

namespace jax_ep::cuda {

cudaError_t EncodeRows(const EncodeRowsArgs& args, cudaStream_t stream);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_ENCODE_ROWS_H_
