// The fabric of ranks on the GPUs of one process: their launching threads meet on the
// host, and the GPUs read each other's buffers where XLA has put them.
#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "bind/call_reader.h"
#include "bind/cuda/kernels.h"
#include "bind/cuda/launch_thread.h"
#include "bind/handler_list.h"
#include "bind/ops.h"
#include "bind/process/call_site.h"
#include "bind/process/process.h"
#include "cuda/plan.h"
#include "fabric/gpus/stream_exchange.h"
#include "fabric/threads/meeting.h"

namespace jax_ep {
namespace {

// Where a device's call stands, of which only the GPU knows: copied from there when the
// device runs the call for the first time.
std::optional<Role> FindRole(CallSite& site, std::int32_t device,
                             const Whereabouts& where, cudaStream_t stream,
                             CallReader& reader) {
  return site.RoleOf(device, [&]() -> std::optional<Role> {
    Role role = {};
    cudaError_t error = cudaMemcpyAsync(&role.rank, where.rank, sizeof(role.rank),
                                        cudaMemcpyDeviceToHost, stream);
    if (error == cudaSuccess) {
      error = cudaMemcpyAsync(&role.group, where.group, sizeof(role.group),
                              cudaMemcpyDeviceToHost, stream);
    }
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error == cudaSuccess) return role;
    reader.Fail(std::string("CUDA says ") + cudaGetErrorString(error));
    return std::nullopt;
  });
}

// All that is read of a call: the members by FindGroup.
template <typename Op>
void Ask(CallReader& reader) {
  reader.List("members");
  Op::Read(reader);
}

template <typename Op>
struct GpuCall {
  typename Op::Call call;
  StreamCall on_stream;
};

// What the rank of a call that was read does with its peers.
template <typename Op>
std::shared_ptr<GpuCall<Op>> MakeCall(typename Op::Call call, const char* name,
                                      MeetingKey key, Role role, std::int64_t num_ranks,
                                      cudaStream_t stream) {
  auto made = std::make_shared<GpuCall<Op>>();
  made->call = std::move(call);
  Attendance& attendance = made->on_stream.attendance;
  attendance.key = key;
  attendance.print = {.op = name, .rows = 0, .row_bytes = 0};
  attendance.rank = role.rank;
  attendance.num_ranks = static_cast<std::int32_t>(num_ranks);
  for (const LentRows& lent : Op::LentBy(made->call)) {
    attendance.lent.push_back({.data = lent.data, .shared_bytes = lent.bytes()});
    if (attendance.lent.size() == 1) attendance.print.rows = lent.num_rows;
    attendance.print.row_bytes += lent.row_bytes;
  }
  made->on_stream.stream = stream;
  made->on_stream.launch = [&of = *made](const PeerTables& tables) {
    const std::vector<PeerTable> peers(tables.begin(), tables.end());
    Op::SetPeers(of.call, peers);
    return LaunchKernels(of.call, 1, of.on_stream.stream);
  };
  return made;
}

ffi::Error ErrorOf(const std::optional<StreamFailure>& failure) {
  if (!failure) return ffi::Error::Success();
  if (failure->is_of_cuda) return ffi::Error::Internal("jax_ep: " + failure->what);
  return MeetingError(failure->what);
}

template <typename Op>
Launched ExchangeDevices(CallSite* site, ffi::RunId run, std::int32_t device,
                         cudaStream_t stream, ffi::RemainingArgs operands,
                         ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  typename Op::Call call = Op::Read(reader);
  const Whereabouts& where = reader.where();
  reader.Require(where.num_stacked == 1, "one rank on each device");
  if (reader.failed()) return NotLaunched(reader.error());
  const auto role = FindRole(*site, device, where, stream, reader);
  const Group group = role ? FindGroup(reader, device, *role) : Group{};
  if (reader.failed()) return NotLaunched(reader.error());
  const MeetingKey key = {
      .run_id = run.run_id, .call_site = site->number, .group = group.number};
  const auto made =
      MakeCall<Op>(std::move(call), where.call, key, *role, where.num_ranks, stream);
  return OnLaunchThread(stream, [made] {
    return ErrorOf(ExchangeOnStreams(ProcessMeetingPoint(), made->on_stream));
  });
}

struct GatheredPlan {
  PlanOp::Call call;
  std::int32_t* workspace;
};

// XLA has gathered all ranks' choices, so that each makes its own plan of them. The
// members are not read: every call of this fabric has them.
GatheredPlan ReadPlan(CallReader& reader) {
  reader.List("members");
  const std::int64_t num_ranks = reader.where().num_ranks;
  const std::int64_t choices =
      reader.Attribute("num_tokens") * reader.Attribute("num_topk");
  const auto* gathered = reader.Operand<std::int32_t>("gathered", num_ranks * choices);
  GatheredPlan plan = {.call = PlanOp::Read(reader), .workspace = nullptr};
  const std::int64_t words = reader.failed() ? 0 : cuda::PlanWorkspace(plan.call.args);
  plan.workspace = reader.Result<std::int32_t>("workspace", words);
  plan.call.args.topk_idx =
      PeerTable(gathered, choices * static_cast<std::int64_t>(sizeof(std::int32_t)));
  return plan;
}

ffi::Error PlanDevices(cudaStream_t stream, ffi::RemainingArgs operands,
                       ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  const GatheredPlan plan = ReadPlan(reader);
  if (reader.failed()) return reader.error();
  const cuda::PlanRanks ranks = {.ranks = reader.where().rank, .num_stacked = 1};
  return CudaError(
      cuda::MakePlans(plan.call.args, plan.call.own, ranks, plan.workspace, stream));
}

}  // namespace
}  // namespace jax_ep

// Nobody waits for a plan, so that XLA may record it into a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_devices, jax_ep::PlanDevices,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
EP_LIST_HANDLER(plan_devices, jax_ep::ReadPlan, {"execute", "jax_ep_plan_devices"})

// A graph could not wait for what another one's stream records.
#define EP_DEFINE_DEVICES(name, Op)                                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_devices,                           \
                                jax_ep::ExchangeDevices<jax_ep::Op>,               \
                                xla::ffi::Ffi::Bind()                              \
                                    .Ctx<xla::ffi::State<jax_ep::CallSite>>()      \
                                    .Ctx<xla::ffi::RunId>()                        \
                                    .Ctx<xla::ffi::DeviceOrdinal>()                \
                                    .Ctx<xla::ffi::PlatformStream<cudaStream_t>>() \
                                    .RemainingArgs()                               \
                                    .RemainingRets()                               \
                                    .Attrs());                                     \
  EP_LIST_HANDLER(name##_devices, jax_ep::Ask<jax_ep::Op>,                         \
                  {"instantiate", "jax_ep_new_call_site"},                         \
                  {"execute", "jax_ep_" #name "_devices"})

EP_FOR_EACH_PLANNED_OP(EP_DEFINE_DEVICES)
