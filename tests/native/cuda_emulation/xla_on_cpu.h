// Lets XLA:CPU run the handlers for GPUs, each of its devices an emulated GPU. Included
// before everything else where ffi/bind/cuda is compiled for that.

#ifndef JAX_EP_TESTS_NATIVE_CUDA_EMULATION_XLA_ON_CPU_H_
#define JAX_EP_TESTS_NATIVE_CUDA_EMULATION_XLA_ON_CPU_H_

#include <cuda_runtime.h>

#include <optional>
#include <string>

#include "fabric/work/crew.h"
#include "xla/ffi/api/ffi.h"

namespace xla::ffi {

// A handler that asks for the stream gets its device's, with the device current, as
// XLA:GPU has it. What the context is called depends on the version of XLA.
template <>
struct CtxDecoding<PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;

  template <typename Context>
  static std::optional<Type> Decode(const XLA_FFI_Api* api, Context* context,
                                    DiagnosticEngine& diagnostic) {
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    if (!device || cudaSetDevice(*device) != cudaSuccess) return std::nullopt;
    return jax_ep::emulation::StreamOf(*device);
  }
};

}  // namespace xla::ffi

namespace jax_ep::emulation {

// A handler as XLA:CPU calls it. One of which a graph could be made runs as if it were,
// and its stream is waited for, as XLA:CPU uses results when the handler has returned.
template <auto handler>
struct OnCpu {
  static constexpr auto Run = handler;
};

template <typename... Args, xla::ffi::Error (*handler)(cudaStream_t, Args...)>
struct OnCpu<handler> {
  static xla::ffi::Error Run(cudaStream_t stream, Args... args) {
    SetCapturing(true);
    xla::ffi::Error error = handler(stream, args...);
    SetCapturing(false);
    const cudaError_t ended = cudaStreamSynchronize(stream);
    if (error.failure() || ended == cudaSuccess) return error;
    return xla::ffi::Error::Internal(std::string("emulated CUDA says ") +
                                     cudaGetErrorString(ended));
  }
};

}  // namespace jax_ep::emulation

// Takes the place of bind/cuda/launch_thread.h. XLA:CPU runs independent calls in
// different orders on different devices: a thread of it that waited could be the one
// which a peer needs to come. So exchanges run on threads of their own.
#define JAX_EP_FFI_BIND_CUDA_LAUNCH_THREAD_H_

namespace jax_ep {

// So processes name their exchanges, by the numbers of their calls. These agree where
// all compile the same programs in one order, as tests do.
inline constexpr bool kLaunchesInOrder = false;

using Launched = xla::ffi::Future;

inline Launched NotLaunched(const xla::ffi::Error& error) {
  xla::ffi::Promise promise;
  Launched launched(promise);
  promise.SetError(error);
  return launched;
}

template <typename Exchange>
Launched OnLaunchThread(cudaStream_t stream, Exchange exchange) {
  static auto* crew = new Crew();
  xla::ffi::Promise promise;
  Launched launched(promise);
  int device = 0;
  cudaGetDevice(&device);
  crew->Schedule([stream, exchange, promise, device]() mutable {
    cudaSetDevice(device);
    xla::ffi::Error error = exchange();
    const cudaError_t ended = cudaStreamSynchronize(stream);
    if (error.success() && ended != cudaSuccess) {
      error = xla::ffi::Error::Internal(cudaGetErrorString(ended));
    }
    error.success() ? promise.SetAvailable() : promise.SetError(error);
  });
  return launched;
}

}  // namespace jax_ep

#undef XLA_FFI_DEFINE_HANDLER_SYMBOL
#define XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, handler, binding, ...)      \
  extern "C" XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame) {            \
    static auto* bound =                                                  \
        (binding).To(jax_ep::emulation::OnCpu<(handler)>::Run).release(); \
    return bound->Call(frame);                                            \
  }                                                                       \
  static_assert(true)

#endif  // JAX_EP_TESTS_NATIVE_CUDA_EMULATION_XLA_ON_CPU_H_
