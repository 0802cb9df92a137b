// A call whose ranks meet, each on a device of its own: what the fabrics of devices and
// of processes have in common.
#ifndef JAX_EP_FFI_BIND_CPU_MEETING_CALL_H_
#define JAX_EP_FFI_BIND_CPU_MEETING_CALL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/cpu/works.h"
#include "bind/handler_list.h"
#include "bind/ops.h"
#include "bind/process/call_site.h"
#include "bind/process/process.h"
#include "cpu/plan_fault.h"
#include "fabric/threads/meeting.h"
#include "fabric/threads/recorder.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Tells XLA that a call has ended.
inline void Complete(ffi::Promise promise, const std::optional<std::string>& failure) {
  if (failure) {
    promise.SetError(MeetingError(*failure));
  } else {
    promise.SetAvailable();
  }
}

// As the CPU reads it.
inline Role RoleOf(const Whereabouts& where) {
  return {.rank = *where.rank, .group = *where.group};
}

// What XLA tells a handler beside the call itself.
struct Arrival {
  CallSite* site;
  ffi::RunId run;
  std::int32_t device;
  Group group = {};
};

// A call of one device that waits for the other devices' ones.
template <typename Op>
struct PendingCall {
  typename Op::Call call;
  cpu::PlanFault fault;
  ffi::Promise promise;
};

// Only the rank that others expect to makes all plans.
inline void SetMakesAll(PlanOp::Call& call, bool makes_all) {
  call.makes_all = makes_all;
}
template <typename KernelArgs>
void SetMakesAll(PlannedCall<KernelArgs>&, bool) {}

inline std::uint32_t FingerprintOf(const PlanOp::Call&) { return 0; }
template <typename KernelArgs>
std::uint32_t FingerprintOf(const PlannedCall<KernelArgs>& call) {
  return *call.plan.fingerprint;
}

// What a call's rank does at the meeting, with the other ranks of this process.
template <typename Op>
Attendance AttendanceOf(const std::shared_ptr<PendingCall<Op>>& pending,
                        const Whereabouts& where, const Arrival& arrival) {
  Attendance attendance = {
      .key = {.run_id = arrival.run.run_id,
              .call_site = arrival.site->number,
              .group = arrival.group.number},
      .print = {.op = where.call,
                .rows = 0,
                .row_bytes = 0,
                .plan = FingerprintOf(pending->call)},
      .rank = *where.rank,
      .num_ranks = static_cast<std::int32_t>(where.num_ranks),
      .lent = {},
      .make_work =
          [pending](const PeerTables& tables) {
            const std::vector<PeerTable> peers(tables.begin(), tables.end());
            Op::SetPeers(pending->call, peers);
            return WorksOf(pending->call);
          },
      .done =
          [pending, name = where.call](const auto& failure) {
            // The peers only read what this rank lent: its plan's fault is its own.
            if (!failure && pending->fault.what() != nullptr) {
              pending->promise.SetError(BadPlan(name, pending->fault));
            } else {
              Complete(pending->promise, failure);
            }
          },
      .schedule = nullptr,
  };
  AddLent(Op::LentBy(pending->call), attendance);
  SetMakesAll(pending->call, *where.rank == 0);
  return attendance;
}

// Has a call that `reader` has read take part in its exchange. Returns without waiting
// for the other ranks: XLA goes on with what does not need the result. Before it meets
// them, `prepare(arrival, attendance)` may add what it knows, or fail the reader.
template <typename Op, typename Prepare>
void Meet(const std::shared_ptr<PendingCall<Op>>& pending, CallReader& reader,
          Arrival arrival, ffi::ThreadPool& pool, Prepare prepare) {
  NoteFaultsIn(pending->fault, pending->call);
  if (reader.failed()) return pending->promise.SetError(reader.error());
  arrival.group = FindGroup(reader, arrival.device, RoleOf(reader.where()));
  if (reader.failed()) return pending->promise.SetError(reader.error());
  Attendance attendance = AttendanceOf(pending, reader.where(), arrival);
  attendance.schedule = ScheduleOn(pool);
  if (RecordsCalls()) attendance.scope = reader.Scope();
  prepare(arrival, attendance);
  if (reader.failed()) return pending->promise.SetError(reader.error());
  ProcessMeetingPoint().Attend(attendance);
}

}  // namespace jax_ep

// Defines and lists an op's handler of a fabric whose ranks meet. `ask` asks a reader
// for all that `handler` and what it calls read of a call.
#define EP_DEFINE_MEETING_HANDLER(name, fabric, handler, ask)                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_##fabric, handler,               \
                                xla::ffi::Ffi::Bind()                            \
                                    .Ctx<xla::ffi::State<jax_ep::CallSite>>()    \
                                    .Ctx<xla::ffi::RunId>()                      \
                                    .Ctx<xla::ffi::DeviceOrdinal>()              \
                                    .Ctx<xla::ffi::ThreadPool>()                 \
                                    .RemainingArgs()                             \
                                    .RemainingRets()                             \
                                    .Attrs());                                   \
  EP_LIST_HANDLER(name##_##fabric, ask, {"instantiate", "jax_ep_new_call_site"}, \
                  {"execute", "jax_ep_" #name "_" #fabric})

#endif  // JAX_EP_FFI_BIND_CPU_MEETING_CALL_H_
