// Implements streams.h: a stream is a thread of the host, device memory is a file that
// other processes can map, and an event is two numbers in such a file.
#include "streams.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "event.h"

namespace jax_ep::emulation {
namespace {

using std::chrono::microseconds;

std::chrono::microseconds LatencyFromEnvironment() {
  const char* text = std::getenv("JAX_EP_EMULATED_LATENCY_US");
  return microseconds(text == nullptr ? 0 : std::atoi(text));
}

std::atomic<microseconds> latency{LatencyFromEnvironment()};
std::atomic<bool> can_access_peers{std::getenv("JAX_EP_EMULATED_WITHOUT_PEERS") ==
                                   nullptr};
thread_local int current_device = 0;
thread_local bool is_capturing = false;

}  // namespace

class Stream {
 public:
  Stream() : thread_([this] { Serve(); }) {}
  ~Stream() {
    {
      const std::scoped_lock lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void Enqueue(std::function<cudaError_t()> operation) {
    const std::scoped_lock lock(mutex_);
    operations_.push_back(std::move(operation));
    changed_.notify_all();
  }

  cudaError_t Synchronize() {
    std::unique_lock lock(mutex_);
    const std::uint64_t until = ended_ + operations_.size() + (is_busy_ ? 1 : 0);
    changed_.wait(lock, [&] { return ended_ >= until; });
    return error_;
  }

 private:
  void Serve() {
    std::mt19937_64 random(reinterpret_cast<std::uintptr_t>(this));
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stopping_ || !operations_.empty(); });
      if (operations_.empty()) return;
      const std::function<cudaError_t()> operation = std::move(operations_.front());
      operations_.pop_front();
      is_busy_ = true;
      lock.unlock();
      Idle(random);
      const cudaError_t error = operation();
      lock.lock();
      if (error_ == cudaSuccess) error_ = error;
      is_busy_ = false;
      ++ended_;
      changed_.notify_all();
    }
  }

  static void Idle(std::mt19937_64& random) {
    const auto longest = static_cast<std::uint64_t>(latency.load().count());
    if (longest > 0) std::this_thread::sleep_for(microseconds(random() % longest));
  }

  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::deque<std::function<cudaError_t()>> operations_;
  cudaError_t error_ = cudaSuccess;
  std::uint64_t ended_ = 0;
  bool is_busy_ = false;
  bool stopping_ = false;
  std::thread thread_;
};

namespace {

// Device memory by its address: this process's, or opened from another.
class Memory {
 public:
  cudaError_t Add(std::unique_ptr<Mapping> mapping, void** memory) {
    if (mapping->data() == nullptr) return cudaErrorMemoryAllocation;
    *memory = mapping->data();
    const std::scoped_lock lock(mutex_);
    mappings_[*memory] = std::move(mapping);
    return cudaSuccess;
  }
  cudaError_t Remove(void* memory) {
    const std::scoped_lock lock(mutex_);
    return mappings_.erase(memory) == 1 ? cudaSuccess : cudaErrorInvalidValue;
  }
  cudaError_t HandleOf(void* memory, EmulatedIpcHandle* handle) {
    const std::scoped_lock lock(mutex_);
    const auto found = mappings_.find(memory);
    if (found == mappings_.end()) return cudaErrorInvalidValue;
    *handle = found->second->handle();
    return cudaSuccess;
  }

 private:
  std::mutex mutex_;
  std::map<void*, std::unique_ptr<Mapping>> mappings_;
};

Memory& TheMemory() {
  static auto* memory = new Memory();
  return *memory;
}

cudaError_t NewEvent(std::shared_ptr<Mapping> mapping, cudaEvent_t* event) {
  if (mapping->data() == nullptr) return cudaErrorMemoryAllocation;
  *event = new Event(std::move(mapping));
  return cudaSuccess;
}

}  // namespace

cudaError_t Enqueue(cudaStream_t stream, std::function<cudaError_t()> operation) {
  if (stream == nullptr) return operation();
  stream->Enqueue(std::move(operation));
  return cudaSuccess;
}

void SetLatency(std::chrono::microseconds longest) { latency.store(longest); }

void SetPeerAccess(bool can) { can_access_peers.store(can); }

cudaStream_t StreamOf(int device) {
  static auto* mutex = new std::mutex();
  static auto* streams = new std::map<int, Stream*>();
  const std::scoped_lock lock(*mutex);
  Stream*& stream = (*streams)[device];
  if (stream == nullptr) stream = new Stream();
  return stream;
}

void SetCapturing(bool capturing) { is_capturing = capturing; }

}  // namespace jax_ep::emulation

namespace emulation = jax_ep::emulation;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorPeerAccessUnsupported:
      return "peer access is not supported between these two devices";
    case cudaErrorPeerAccessAlreadyEnabled:
      return "peer access is already enabled";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorInvalidValue:
      break;
  }
  return "invalid argument";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulation::kMaxDevices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::kMaxDevices) return cudaErrorInvalidDevice;
  emulation::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = device != peer && emulation::can_access_peers.load() ? 1 : 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return cudaErrorPeerAccessAlreadyEnabled;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new emulation::Stream();
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (emulation::is_capturing) return cudaErrorStreamCaptureUnsupported;
  return stream == nullptr ? cudaSuccess : stream->Synchronize();
}

// What was put on a stream before this call is waited for, not what comes later.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (emulation::is_capturing) return cudaErrorStreamCaptureUnsupported;
  if (event == nullptr) return cudaErrorInvalidResourceHandle;
  return emulation::Enqueue(stream, [awaited = *event, generation = event->recorded()] {
    return awaited.Await(generation);
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  constexpr std::size_t kBytes = sizeof(emulation::Event::Words);
  const bool is_shared = (flags & cudaEventInterprocess) != 0;
  return emulation::NewEvent(std::make_shared<emulation::Mapping>(kBytes, is_shared),
                             event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (emulation::is_capturing) return cudaErrorStreamCaptureUnsupported;
  if (event == nullptr) return cudaErrorInvalidResourceHandle;
  return emulation::Enqueue(stream, [reached = *event, generation = event->Record()] {
    reached.Complete(generation);
    return cudaSuccess;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (emulation::is_capturing) return cudaErrorStreamCaptureUnsupported;
  return event->Await(event->recorded());
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (emulation::is_capturing) return cudaErrorStreamCaptureUnsupported;
  return emulation::TheMemory().Add(std::make_unique<emulation::Mapping>(bytes, true),
                                    memory);
}

cudaError_t cudaFree(void* memory) { return emulation::TheMemory().Remove(memory); }

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  if (emulation::is_capturing) return cudaErrorStreamCaptureUnsupported;
  *memory = std::malloc(bytes);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                            cudaMemcpyKind, cudaStream_t stream) {
  return emulation::Enqueue(stream, [=] {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
  });
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory) {
  return emulation::TheMemory().HandleOf(memory, &handle->at);
}

// As CUDA does, it refuses what this process has made itself.
cudaError_t cudaIpcOpenMemHandle(void** memory, cudaIpcMemHandle_t handle, unsigned) {
  if (handle.at.process == getpid()) return cudaErrorInvalidResourceHandle;
  return emulation::TheMemory().Add(std::make_unique<emulation::Mapping>(handle.at),
                                    memory);
}

cudaError_t cudaIpcCloseMemHandle(void* memory) {
  return emulation::TheMemory().Remove(memory);
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  if (!event->mapping().is_shared()) return cudaErrorInvalidResourceHandle;
  handle->at = event->mapping().handle();
  return cudaSuccess;
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  if (handle.at.process == getpid()) return cudaErrorInvalidResourceHandle;
  return emulation::NewEvent(std::make_shared<emulation::Mapping>(handle.at), event);
}
