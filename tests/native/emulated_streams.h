// Emulated streams as tests use them.

#ifndef JAX_EP_TESTS_NATIVE_EMULATED_STREAMS_H_
#define JAX_EP_TESTS_NATIVE_EMULATED_STREAMS_H_

#include <cuda_runtime.h>

#include <chrono>

namespace jax_ep {

// Has streams idle before each operation while it lives.
class Latency {
 public:
  explicit Latency(std::chrono::microseconds longest) {
    emulation::SetLatency(longest);
  }
  ~Latency() { emulation::SetLatency(std::chrono::microseconds(0)); }
  Latency(const Latency&) = delete;
  Latency& operator=(const Latency&) = delete;
};

class OwnStream {
 public:
  OwnStream() { cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking); }
  ~OwnStream() { cudaStreamDestroy(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_EMULATED_STREAMS_H_
