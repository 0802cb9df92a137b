// The words in which errors pass on what CUDA says.

#ifndef JAX_EP_FFI_FABRIC_GPUS_CUDA_SAYS_H_
#define JAX_EP_FFI_FABRIC_GPUS_CUDA_SAYS_H_

#include <cuda_runtime.h>

#include <string>

namespace jax_ep {

inline std::string CudaSays(cudaError_t error) {
  return std::string("CUDA says ") + cudaGetErrorString(error);
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_GPUS_CUDA_SAYS_H_
