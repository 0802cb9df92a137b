// Stands in for the part of CUDA's runtime that has to do with devices, streams, events
// and memory.

#ifndef JAX_EP_TESTS_NATIVE_CUDA_EMULATION_STREAMS_H_
#define JAX_EP_TESTS_NATIVE_CUDA_EMULATION_STREAMS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorPeerAccessUnsupported = 217,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorPeerAccessAlreadyEnabled = 704,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
};

namespace jax_ep::emulation {
class Stream;
class Event;
}  // namespace jax_ep::emulation

// A null stream carries out at once what is put on it.
using cudaStream_t = jax_ep::emulation::Stream*;
using cudaEvent_t = jax_ep::emulation::Event*;

inline constexpr unsigned cudaEventDisableTiming = 2;
inline constexpr unsigned cudaEventInterprocess = 4;
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaHostAllocPortable = 1;
inline constexpr unsigned cudaHostAllocMapped = 2;
inline constexpr unsigned cudaIpcMemLazyEnablePeerAccess = 1;

// Says where another process finds a file of this one.
struct EmulatedIpcHandle {
  std::int32_t process;
  std::int32_t file;
  std::int64_t bytes;
};
struct cudaIpcMemHandle_t {
  EmulatedIpcHandle at;
  char unused[64 - sizeof(EmulatedIpcHandle)];
};
struct cudaIpcEventHandle_t {
  EmulatedIpcHandle at;
  char unused[64 - sizeof(EmulatedIpcHandle)];
};

const char* cudaGetErrorString(cudaError_t error);

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer);
// As if XLA had done it already.
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags);
cudaError_t cudaGetLastError();

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event,
                                unsigned flags = 0);

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);

cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
// Of the host, where streams may write.
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                            cudaMemcpyKind kind, cudaStream_t stream);

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory);
cudaError_t cudaIpcOpenMemHandle(void** memory, cudaIpcMemHandle_t handle,
                                 unsigned flags);
cudaError_t cudaIpcCloseMemHandle(void* memory);
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event);
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle);

namespace jax_ep::emulation {

// Devices that there are. Their numbers are any that this many bits hold, as XLA:CPU
// numbers those of several processes with gaps.
inline constexpr int kMaxDevices = 1 << 20;

// Puts an operation on a stream; its error is the stream's from then on.
cudaError_t Enqueue(cudaStream_t stream, std::function<cudaError_t()> operation);

// How long, at most and at random, a stream idles before each operation, as if it had
// other work. What is missing in the order of streams then shows.
void SetLatency(std::chrono::microseconds longest);

// What cudaDeviceCanAccessPeer says from now on.
void SetPeerAccess(bool can);

// The stream that XLA would launch a device's work on; it comes to be when it is first
// asked for, and stays.
cudaStream_t StreamOf(int device);

// Whether what this thread does is being recorded into a graph, where nothing may be
// waited for or allocated.
void SetCapturing(bool is_capturing);

}  // namespace jax_ep::emulation

#endif  // JAX_EP_TESTS_NATIVE_CUDA_EMULATION_STREAMS_H_
