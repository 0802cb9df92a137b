// A GPU's clock beside the host's, so that what is recorded on several can be compared.

#ifndef JAX_EP_FFI_FABRIC_GPUS_GPU_CLOCK_H_
#define JAX_EP_FFI_FABRIC_GPUS_GPU_CLOCK_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "fabric/gpus/stream_times.h"

namespace jax_ep {

// One moment, in nanoseconds of both clocks; for jax_ep/_stream_times.py to read.
struct ClockReading {
  std::int64_t device;
  std::int64_t gpu;
  std::int64_t host;  // SteadyNow
};

// Reads a device's, and leaves it the current one. That takes some launches on a stream
// of its own, each of which is waited for; what the clocks say of the shortest is known
// to within half of what that took.
cudaError_t ReadClock(int device, Stamp stamp, ClockReading& reading);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_GPUS_GPU_CLOCK_H_
