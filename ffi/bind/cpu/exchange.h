#ifndef JAX_EP_FFI_BIND_CPU_EXCHANGE_H_
#define JAX_EP_FFI_BIND_CPU_EXCHANGE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bind/call_reader.h"
#include "bind/cpu/call_site.h"
#include "cpu/plan_fault.h"
#include "cpu/publish_rows.h"
#include "fabric/threads/meeting.h"
#include "fabric/work/work_share.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Where the devices of this process meet.
MeetingPoint& ProcessMeetingPoint();

Schedule ScheduleOn(ffi::ThreadPool& pool);

// Tells XLA that a call has ended.
void Complete(ffi::Promise promise, const std::optional<std::string>& failure);

// What the CPU must know of an exchange besides its kernel. An Op has
//   Args, with OfStacked(i)
//   Args Read(CallReader&): the first stacked rank's, with tables of the stacked ones
//   Work MakeWork(const Args&)
//   Lent LentBy(const Args&): what a rank's peers read, of its buffers or its Args
//   void SetPeers(Args&, const PeerTables&)
//   DimsOf(const Args&): of what a rank lends, for its CallPrint
//   kPullsRows: whether each token pulls its choices' rows
//   PublishRowsArgs PublicationOf(const Args&, const Published&): what other processes
//     are to find of a rank's lent buffers

// Has an exchange's kernels note what is wrong with its plan, if they read one.
template <typename Args>
void NoteFaultsIn(PlanFault& fault, Args& args) {
  if constexpr (requires { args.fault; }) args.fault = &fault;
}

// The error of a call whose plan had a fault.
ffi::Error BadPlan(const char* op, const PlanFault& fault);

// Runs an exchange of ranks whose operands are stacked on one device.
template <typename Op>
ffi::Error ExchangeStacked(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  typename Op::Args first = Op::Read(reader);
  if (reader.failed()) return reader.error();
  PlanFault fault;
  NoteFaultsIn(fault, first);
  const std::int64_t count = reader.where().num_stacked;
  std::vector<typename Op::Args> args;
  args.reserve(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) args.push_back(first.OfStacked(i));
  std::vector<Work> works;
  works.reserve(args.size());
  for (const auto& rank_args : args) works.push_back(Op::MakeWork(rank_args));
  RunTogether(std::move(works), ScheduleOn(pool));
  if (fault.what() != nullptr) return BadPlan(reader.where().call, fault);
  return ffi::Error::Success();
}

// A call of one device that waits for the other devices' ones.
template <typename Op>
struct PendingCall {
  typename Op::Args args;
  PublishRowsArgs publication;
  PlanFault fault;
  ffi::Promise promise;
};

// What only a call says that may span processes.
struct SpanningCall {
  const std::int32_t* numbers;   // [num_ranks], what the roll call has told
  const std::int32_t* recv_row;  // as in GatherRowsArgs
  const std::int32_t* recv_counts;
};

SpanningCall ReadSpanningCall(CallReader& reader, bool pulls_rows);

// Finds out where a call's rank exchanges, and what it publishes there, if not all of
// its group are in this process.
template <typename Op>
std::shared_ptr<const Span> FindSpan(CallSite* site, std::int32_t device,
                                     const Group& group, std::int64_t run_id,
                                     CallReader& reader, PendingCall<Op>& call) {
  if (reader.failed() || !group.Spans(ProcessIndex())) return nullptr;
  const SpanningCall spanning = ReadSpanningCall(reader, Op::kPullsRows);
  if (reader.failed()) return nullptr;
  auto span = site->SpanOf(device);
  if (span == nullptr) {
    const FirstRun run = DescribeRun(reader, group, run_id);
    auto made = site->NewSpan(device, run, spanning.numbers[0]);
    if (const auto* problem = std::get_if<std::string>(&made)) {
      reader.Fail(*problem);
      return nullptr;
    }
    span = std::move(std::get<std::shared_ptr<const Span>>(made));
  }
  call.publication = Op::PublicationOf(call.args, spanning, *span);
  return span;
}

// What a call's rank does at the meeting; the caller adds when and where that is.
template <typename Op>
Attendance AttendanceOf(const std::shared_ptr<PendingCall<Op>>& call,
                        const Whereabouts& where) {
  const PublishRowsArgs& publication = call->publication;
  Attendance attendance = {
      .key = {},
      .print = {.op = where.call, .dims = Op::DimsOf(call->args)},
      .rank = *where.rank,
      .num_ranks = static_cast<std::int32_t>(where.num_ranks),
      .lent = Op::LentBy(call->args),
      .make_work =
          [call](const PeerTables& tables) {
            Op::SetPeers(call->args, tables);
            return Op::MakeWork(call->args);
          },
      .done =
          [call, name = where.call](const auto& failure) {
            // The peers only read what this rank lent: its plan's fault is its own.
            if (!failure && call->fault.what() != nullptr) {
              call->promise.SetError(BadPlan(name, call->fault));
            } else {
              Complete(call->promise, failure);
            }
          },
      .schedule = nullptr,
      .lent_bytes = {publication.num_rows * publication.row_bytes,
                     publication.whole_bytes},
      .make_publication =
          [call](const std::array<void*, 2>& places) {
            call->publication.to = places[0];
            call->publication.whole_to = places[1];
            return PublishRowsWork(call->publication);
          },
  };
  attendance.print.plan = *where.fingerprint;
  return attendance;
}

// Takes part in an exchange with the other devices. Returns without waiting for them:
// XLA goes on with what does not need the result.
template <typename Op>
ffi::Future ExchangeDevices(CallSite* site, ffi::RunId run, std::int32_t device,
                            ffi::ThreadPool pool, ffi::RemainingArgs operands,
                            ffi::RemainingRets results, ffi::Dictionary attributes) {
  const auto call = std::make_shared<PendingCall<Op>>();
  ffi::Future future(call->promise);
  CallReader reader(operands, results, attributes);
  call->args = Op::Read(reader);
  NoteFaultsIn(call->fault, call->args);
  const Whereabouts& where = reader.where();
  const Group group = FindGroup(reader, device);
  const auto span = FindSpan(site, device, group, run.run_id, reader, *call);
  if (reader.failed()) {
    call->promise.SetError(reader.error());
    return future;
  }
  if constexpr (requires { call->args.makes_all; }) {
    // The first rank of this process.
    std::int32_t first = 0;
    while (span && !span->IsHere(first)) ++first;
    call->args.makes_all = *where.rank == first;
  }
  Attendance attendance = AttendanceOf(call, where);
  attendance.key = {
      .run_id = run.run_id, .call_site = site->number, .group = group.number};
  attendance.schedule = ScheduleOn(pool);
  attendance.span = span;
  ProcessMeetingPoint().Attend(attendance);
  return future;
}

}  // namespace jax_ep

// Defines an op's two handlers: jax_ep_NAME_stacked, which is `Stacked`, and
// jax_ep_NAME_devices.
#define EP_DEFINE_HANDLERS(name, Op, Stacked)                                         \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_stacked, Stacked,                     \
                                xla::ffi::Ffi::Bind()                                 \
                                    .Ctx<xla::ffi::ThreadPool>()                      \
                                    .RemainingArgs()                                  \
                                    .RemainingRets()                                  \
                                    .Attrs());                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_devices, jax_ep::ExchangeDevices<Op>, \
                                xla::ffi::Ffi::Bind()                                 \
                                    .Ctx<xla::ffi::State<jax_ep::CallSite>>()         \
                                    .Ctx<xla::ffi::RunId>()                           \
                                    .Ctx<xla::ffi::DeviceOrdinal>()                   \
                                    .Ctx<xla::ffi::ThreadPool>()                      \
                                    .RemainingArgs()                                  \
                                    .RemainingRets()                                  \
                                    .Attrs())

#endif  // JAX_EP_FFI_BIND_CPU_EXCHANGE_H_
