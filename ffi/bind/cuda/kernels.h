// The kernels for GPUs, op by op, as the handlers of every fabric launch them.
#ifndef JAX_EP_FFI_BIND_CUDA_KERNELS_H_
#define JAX_EP_FFI_BIND_CUDA_KERNELS_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "bind/ops.h"
#include "cuda/gather_rows.h"
#include "cuda/gather_scaled.h"
#include "cuda/reduce_rows.h"
#include "cuda/row_dots.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

inline cudaError_t LaunchKernel(const GatherRowsArgs& args, std::int64_t num_stacked,
                                cudaStream_t stream) {
  return (args.scaled ? cuda::GatherScaled : cuda::GatherRows)(args, num_stacked,
                                                               stream);
}

inline cudaError_t LaunchKernel(const ReduceRowsArgs& args, std::int64_t num_stacked,
                                cudaStream_t stream) {
  return cuda::ReduceRows(args, num_stacked, stream);
}

inline cudaError_t LaunchKernel(const RowDotsArgs& args, std::int64_t num_stacked,
                                cudaStream_t stream) {
  return cuda::RowDots(args, num_stacked, stream);
}

// Puts a call's kernels for `num_stacked` ranks on the stream.
template <typename KernelArgs>
cudaError_t LaunchKernels(const PlannedCall<KernelArgs>& call, std::int64_t num_stacked,
                          cudaStream_t stream) {
  for (const KernelArgs& args : call.kernels) {
    const cudaError_t error = LaunchKernel(args, num_stacked, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

inline ffi::Error CudaError(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_ep: CUDA says ") +
                              cudaGetErrorString(error));
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_CUDA_KERNELS_H_
