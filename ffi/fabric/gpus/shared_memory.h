// Whether GPUs of one process can read memory of GPUs of another: found out by doing
// so, before any exchange relies on it.

#ifndef JAX_EP_FFI_FABRIC_GPUS_SHARED_MEMORY_H_
#define JAX_EP_FFI_FABRIC_GPUS_SHARED_MEMORY_H_

#include <cuda_runtime.h>

namespace jax_ep {

// Lets a device read all memory of another one of this process: what XLA has, and
// windows. Fails where it cannot.
cudaError_t ReachPeer(int device, int peer);

// Fills in the handle of some memory of a device, a cudaIpcMemHandle_t, that stays for
// good. Fails too where the device cannot share events.
cudaError_t OfferMemory(int device, void* handle);

// Has a device read what another process has offered.
cudaError_t TryMemory(int device, const void* handle);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_GPUS_SHARED_MEMORY_H_
