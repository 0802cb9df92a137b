// A kernel that does nothing, compiled for the same devices as all others.

#include "cuda/probe.h"

namespace jax_ep::cuda {
namespace {

__global__ void ProbeKernel() {}

}  // namespace

cudaError_t Probe() {
  cudaFuncAttributes attributes = {};
  return cudaFuncGetAttributes(&attributes, ProbeKernel);
}

}  // namespace jax_ep::cuda
