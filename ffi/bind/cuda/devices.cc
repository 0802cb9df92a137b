// The fabric of ranks on the GPUs of one process: their launching threads meet on the
// host, and the GPUs read each other's buffers where XLA has put them.
#include <cuda_runtime.h>

#include <cstdint>

#include "bind/call_reader.h"
#include "bind/cuda/gpu_call.h"
#include "bind/cuda/kernels.h"
#include "bind/cuda/launch_thread.h"
#include "bind/cuda/partial_sums.h"
#include "bind/ops.h"
#include "bind/process/call_site.h"

namespace jax_ep {
namespace {

template <typename Op>
using OnDevices = WithPartialSums<Op, SumsPlace::kResult>;

template <typename Op>
Launched ExchangeDevices(CallSite* site, ffi::RunId run, std::int32_t device,
                         cudaStream_t stream, ffi::RemainingArgs operands,
                         ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  return ExchangeGpus<Op>(
      {.site = site, .run = run, .device = device, .stream = stream}, reader,
      [](const GpuArrival&, StreamCall&) {});
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_DEVICES(name, Op)                                             \
  EP_DEFINE_GPU_HANDLER(name, devices,                                          \
                        jax_ep::ExchangeDevices<jax_ep::OnDevices<jax_ep::Op>>, \
                        jax_ep::AskGpus<jax_ep::OnDevices<jax_ep::Op>>)

EP_FOR_EACH_GPU_OP(EP_DEFINE_DEVICES)
