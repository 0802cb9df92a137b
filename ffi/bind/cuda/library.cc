#include <cuda_runtime.h>

#include "xla/ffi/api/ffi.h"

// What Python asks of the library besides the handlers, by ctypes.
extern "C" {

int jax_ep_ffi_minor_version() { return XLA_FFI_API_MINOR; }

int jax_ep_cuda_version() { return CUDART_VERSION; }

}  // extern "C"
