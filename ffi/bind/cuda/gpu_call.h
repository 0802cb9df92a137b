// A call whose ranks are on several GPUs: what the fabrics of devices and of processes
// have in common.
#ifndef JAX_EP_FFI_BIND_CUDA_GPU_CALL_H_
#define JAX_EP_FFI_BIND_CUDA_GPU_CALL_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bind/call_reader.h"
#include "bind/cuda/kernels.h"
#include "bind/cuda/launch_thread.h"
#include "bind/handler_list.h"
#include "bind/ops.h"
#include "bind/process/call_site.h"
#include "bind/process/process.h"
#include "cuda/stamp.h"
#include "fabric/gpus/stream_exchange.h"
#include "fabric/threads/meeting.h"
#include "fabric/threads/recorder.h"

namespace jax_ep {

// Where a device's call stands, of which only the GPU knows: copied from there when the
// device runs the call for the first time.
std::optional<Role> FindRole(CallSite& site, std::int32_t device,
                             const Whereabouts& where, cudaStream_t stream,
                             CallReader& reader);

// What XLA tells a handler beside the call itself.
struct GpuArrival {
  CallSite* site;
  ffi::RunId run;
  std::int32_t device;
  cudaStream_t stream;
  Role role = {};
  Group group = {};
};

template <typename Op>
struct GpuCall {
  typename Op::Call call;
  StreamCall on_stream;
};

// What the rank of a call that was read does with its peers. `add_span(arrival, call)`
// adds what it knows of those in other processes.
template <typename Op, typename AddSpan>
std::shared_ptr<GpuCall<Op>> MakeCall(typename Op::Call call, const Whereabouts& where,
                                      const GpuArrival& arrival, AddSpan add_span) {
  auto made = std::make_shared<GpuCall<Op>>();
  made->call = std::move(call);
  Attendance& attendance = made->on_stream.attendance;
  attendance.key = {.run_id = arrival.run.run_id,
                    .call_site = arrival.site->number,
                    .group = arrival.group.number};
  attendance.print = {.op = where.call, .rows = 0, .row_bytes = 0};
  attendance.rank = arrival.role.rank;
  attendance.num_ranks = static_cast<std::int32_t>(where.num_ranks);
  made->on_stream.stream = arrival.stream;
  add_span(arrival, made->on_stream);
  if constexpr (requires { &Op::Prepare; }) {
    Op::SetPlace(made->call, attendance.rank, made->on_stream.window != nullptr);
    made->on_stream.prepare = [&of = *made](const std::vector<void*>& places) {
      return Op::Prepare(of.call, places, of.on_stream.stream);
    };
  }
  AddLent(Op::LentBy(made->call), attendance);
  made->on_stream.launch = [&of = *made](const PeerTables& tables) {
    const std::vector<PeerTable> peers(tables.begin(), tables.end());
    Op::SetPeers(of.call, peers);
    return LaunchKernels(of.call, 1, of.on_stream.stream);
  };
  return made;
}

ffi::Error ErrorOf(const std::optional<StreamFailure>& failure);

// Has a call take part in its exchange.
template <typename Op, typename AddSpan>
Launched ExchangeGpus(GpuArrival arrival, CallReader& reader, AddSpan add_span) {
  typename Op::Call call = Op::Read(reader);
  const Whereabouts& where = reader.where();
  reader.Require(where.num_stacked == 1, "one rank on each device");
  if (reader.failed()) return NotLaunched(reader.error());
  const auto role =
      FindRole(*arrival.site, arrival.device, where, arrival.stream, reader);
  if (reader.failed()) return NotLaunched(reader.error());
  arrival.role = *role;
  arrival.group = FindGroup(reader, arrival.device, *role);
  if (reader.failed()) return NotLaunched(reader.error());
  const auto made = MakeCall<Op>(std::move(call), where, arrival, add_span);
  if (RecordsCalls()) {
    made->on_stream.attendance.scope = reader.Scope();
    made->on_stream.stamp = cuda::Stamp;
  }
  return OnLaunchThread(arrival.stream, [made] {
    return ErrorOf(ExchangeOnStreams(ProcessMeetingPoint(), made->on_stream));
  });
}

// All that is read of a call: the members by FindGroup.
template <typename Op>
void AskGpus(CallReader& reader) {
  reader.List("members");
  Op::Read(reader);
}

}  // namespace jax_ep

// Defines and lists an op's handler of a fabric of several GPUs. A graph could not wait
// for what another one's stream records: it is never recorded into one.
#define EP_DEFINE_GPU_HANDLER(name, fabric, handler, ask)                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_##fabric, handler,                 \
                                xla::ffi::Ffi::Bind()                              \
                                    .Ctx<xla::ffi::State<jax_ep::CallSite>>()      \
                                    .Ctx<xla::ffi::RunId>()                        \
                                    .Ctx<xla::ffi::DeviceOrdinal>()                \
                                    .Ctx<xla::ffi::PlatformStream<cudaStream_t>>() \
                                    .RemainingArgs()                               \
                                    .RemainingRets()                               \
                                    .Attrs());                                     \
  EP_LIST_HANDLER(name##_##fabric, ask, {"instantiate", "jax_ep_new_call_site"},   \
                  {"execute", "jax_ep_" #name "_" #fabric})

#endif  // JAX_EP_FFI_BIND_CUDA_GPU_CALL_H_
