// Implements shared_memory.h.

#include "fabric/gpus/shared_memory.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace jax_ep {
namespace {

constexpr std::size_t kBytes = sizeof(std::int32_t);

// Makes a device current while it lives.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
  }
  ~ScopedDevice() { cudaSetDevice(before_); }
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
};

}  // namespace

cudaError_t ReachPeer(int device, int peer) {
  int can = 0;
  cudaError_t error = cudaDeviceCanAccessPeer(&can, device, peer);
  if (error != cudaSuccess) return error;
  if (can == 0) return cudaErrorPeerAccessUnsupported;
  const ScopedDevice scoped(device);
  if (scoped.error() != cudaSuccess) return scoped.error();
  error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error != cudaErrorPeerAccessAlreadyEnabled) return error;
  cudaGetLastError();  // else the next launch would report it
  return cudaSuccess;
}

cudaError_t OfferMemory(int device, void* handle) {
  const ScopedDevice scoped(device);
  cudaEvent_t event = nullptr;
  cudaIpcEventHandle_t event_handle = {};
  cudaError_t error = scoped.error();
  if (error == cudaSuccess) {
    error = cudaEventCreateWithFlags(&event,
                                     cudaEventDisableTiming | cudaEventInterprocess);
  }
  if (error == cudaSuccess) error = cudaIpcGetEventHandle(&event_handle, event);
  if (event != nullptr) cudaEventDestroy(event);
  void* memory = nullptr;
  cudaIpcMemHandle_t memory_handle = {};
  if (error == cudaSuccess) error = cudaMalloc(&memory, kBytes);
  if (error == cudaSuccess) error = cudaIpcGetMemHandle(&memory_handle, memory);
  if (error == cudaSuccess) std::memcpy(handle, &memory_handle, sizeof(memory_handle));
  return error;
}

cudaError_t TryMemory(int device, const void* handle) {
  const ScopedDevice scoped(device);
  cudaIpcMemHandle_t memory_handle = {};
  std::memcpy(&memory_handle, handle, sizeof(memory_handle));
  void* theirs = nullptr;
  void* own = nullptr;
  cudaError_t error = scoped.error();
  if (error == cudaSuccess) {
    error =
        cudaIpcOpenMemHandle(&theirs, memory_handle, cudaIpcMemLazyEnablePeerAccess);
  }
  if (error == cudaSuccess) error = cudaMalloc(&own, kBytes);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(own, theirs, kBytes, cudaMemcpyDeviceToDevice, nullptr);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(nullptr);
  if (own != nullptr) cudaFree(own);
  if (theirs != nullptr) cudaIpcCloseMemHandle(theirs);
  return error;
}

}  // namespace jax_ep
