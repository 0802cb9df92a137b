// The fabric of ranks on the GPUs of several processes of one host: their launching
// threads meet, in a process and between them, and the GPUs read each other's windows.
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/call_reader.h"
#include "bind/cuda/gpu_call.h"
#include "bind/cuda/kernels.h"
#include "bind/cuda/launch_thread.h"
#include "bind/cuda/partial_sums.h"
#include "bind/ops.h"
#include "bind/process/call_site.h"
#include "bind/process/process.h"
#include "fabric/gpus/device_window.h"

namespace jax_ep {
namespace {

template <typename Op>
using BetweenProcesses = WithPartialSums<Op, SumsPlace::kWindow>;

// The window of a rank in the exchanges of its group, which one channel carries out.
// Where a rank may come to one call before it is done with another, each has its own.
DeviceWindow& WindowOf(const Relay& channel, std::int32_t rank, const CallSite& site) {
  using Key = std::tuple<const Relay*, std::int32_t, std::int64_t>;
  static auto* mutex = new std::mutex();
  static auto* windows = new std::map<Key, DeviceWindow>();
  const std::scoped_lock lock(*mutex);
  return (*windows)[{&channel, rank, kLaunchesInOrder ? 0 : site.number}];
}

// Runs are counted from the first that a device has of a call, for the log: then they
// have the same number in all processes.
std::shared_ptr<const Span> MakeSpan(const GpuArrival& arrival) {
  std::vector<std::int32_t> process_of = arrival.group.Processes();
  auto relay = ProcessHost()->ChannelOf(process_of, arrival.group.id);
  return std::make_shared<const Span>(Span{.process_of = std::move(process_of),
                                           .here = ProcessIndex(),
                                           .site = arrival.site->number,
                                           .first_run = arrival.run.run_id,
                                           .relay = std::move(relay),
                                           .group = arrival.group.id});
}

// A group that lies in this process exchanges as on the fabric of devices.
void AddSpan(const GpuArrival& arrival, StreamCall& call) {
  if (!arrival.group.Spans(ProcessIndex())) return;
  call.attendance.span =
      arrival.site->SpanOf(arrival.device, [&] { return MakeSpan(arrival); });
  call.window =
      &WindowOf(*call.attendance.span->relay, arrival.role.rank, *arrival.site);
}

template <typename Op>
Launched ExchangeProcesses(CallSite* site, ffi::RunId run, std::int32_t device,
                           cudaStream_t stream, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  return ExchangeGpus<Op>(
      {.site = site, .run = run, .device = device, .stream = stream}, reader, AddSpan);
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_PROCESSES(name, Op)                                  \
  EP_DEFINE_GPU_HANDLER(                                               \
      name, processes,                                                 \
      jax_ep::ExchangeProcesses<jax_ep::BetweenProcesses<jax_ep::Op>>, \
      jax_ep::AskGpus<jax_ep::BetweenProcesses<jax_ep::Op>>)

EP_FOR_EACH_GPU_OP(EP_DEFINE_PROCESSES)
