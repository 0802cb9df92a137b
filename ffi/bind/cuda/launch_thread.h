// Which thread an exchange may wait on. XLA launches what each GPU does from a thread
// of its own, all in one order, so that a thread which waits there keeps nobody else.
#ifndef JAX_EP_FFI_BIND_CUDA_LAUNCH_THREAD_H_
#define JAX_EP_FFI_BIND_CUDA_LAUNCH_THREAD_H_

#include <cuda_runtime.h>

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

inline constexpr bool kLaunchesInOrder = true;

// What a handler returns whose exchange waits.
using Launched = xla::ffi::Error;

inline Launched NotLaunched(xla::ffi::Error error) { return error; }

// Runs `exchange()`, which puts a call on the stream and returns what went wrong. What
// XLA has told the handler of the call must have been read.
template <typename Exchange>
Launched OnLaunchThread(cudaStream_t, const Exchange& exchange) {
  return exchange();
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_CUDA_LAUNCH_THREAD_H_
