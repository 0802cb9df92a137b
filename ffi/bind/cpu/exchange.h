#ifndef JAX_EP_FFI_BIND_CPU_EXCHANGE_H_
#define JAX_EP_FFI_BIND_CPU_EXCHANGE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bind/call_reader.h"
#include "cpu/publish_rows.h"
#include "fabric/host.h"
#include "fabric/meeting.h"
#include "fabric/work_share.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Identifies one custom call of a compiled program, the same for all its devices. XLA
// makes it when it instantiates the call, so that two calls of one traced function are
// told apart although everything else about them is equal.
struct CallSite {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;

  // Returns whether a device runs the call for the first time.
  bool IsNewTo(std::int32_t device);

  // The ranks that a device's rank meets at this call, in which processes they are;
  // told on its first run and remembered. `processes` and `sites` say, by rank, where
  // it is and what number the roll call has there, or -1 if it was told before.
  std::variant<std::shared_ptr<const Span>, std::string> SpanOf(
      std::int32_t device, std::int32_t group, const std::int32_t* roll,
      std::int64_t num_ranks);

  std::int64_t number;

 private:
  std::mutex mutex_;  // guards all below
  std::set<std::int32_t> devices_;
  std::map<std::int32_t, std::shared_ptr<const Span>> spans_;  // by device
};

// Where the devices of this process meet.
MeetingPoint& ProcessMeetingPoint();

// This process among the others on its host, or null if it has not met them.
Host* ProcessHost();

Schedule ScheduleOn(ffi::ThreadPool& pool);

// Tells XLA that a call has ended.
void Complete(ffi::Promise promise, const std::optional<std::string>& failure);

// What the CPU must know of an exchange besides its kernel. An Op has
//   Args, with OfStacked(i)
//   Args Read(CallReader&): the first stacked rank's, with tables of the stacked ones
//   Work MakeWork(const Args&)
//   Lent LentBy(const Args&): what a rank's peers read, of its buffers or its Args
//   void SetPeers(Args&, const PeerTables&)
//   CallPrint PrintOf(const Args&), but for the plan
//   PublishRowsArgs PublicationOf(const Args&, const Published&): what other processes
//     are to find of a rank's lent buffers

// Runs an exchange of ranks whose operands are stacked on one device.
template <typename Op>
ffi::Error ExchangeStacked(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  const typename Op::Args first = Op::Read(reader);
  if (reader.failed()) return reader.error();
  const std::int64_t count = reader.where().num_stacked;
  std::vector<typename Op::Args> args;
  args.reserve(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) args.push_back(first.OfStacked(i));
  std::vector<Work> works;
  works.reserve(args.size());
  for (const auto& rank_args : args) works.push_back(Op::MakeWork(rank_args));
  RunTogether(std::move(works), ScheduleOn(pool));
  return ffi::Error::Success();
}

// A call of one device that waits for the other devices' ones.
template <typename Op>
struct PendingCall {
  typename Op::Args args;
  PublishRowsArgs publication;
  ffi::Promise promise;
};

// What only a call says that may span processes.
struct SpanningCall {
  const std::int32_t* roll;      // [num_ranks, 2], see CallSite
  const std::int32_t* recv_row;  // as in GatherRowsArgs
  const std::int32_t* recv_counts;
};

SpanningCall ReadSpanningCall(CallReader& reader);

// Finds out with whom a call's rank exchanges, and what it publishes if they are not
// all in this process: then it returns where they are.
template <typename Op>
std::shared_ptr<const Span> FindSpan(CallSite* site, std::int32_t device,
                                     CallReader& reader, PendingCall<Op>& call) {
  if (reader.Attribute("num_processes") <= 1) return nullptr;
  const Whereabouts& where = reader.where();
  const SpanningCall spanning = ReadSpanningCall(reader);
  if (reader.failed()) return nullptr;
  auto found = site->SpanOf(device, *where.group, spanning.roll, where.num_ranks);
  if (const auto* problem = std::get_if<std::string>(&found)) {
    reader.Fail(*problem);
    return nullptr;
  }
  auto span = std::move(std::get<std::shared_ptr<const Span>>(found));
  if (span) call.publication = Op::PublicationOf(call.args, spanning, *span);
  return span;
}

// What a call's rank does at the meeting; the caller adds when and where that is.
template <typename Op>
Attendance AttendanceOf(const std::shared_ptr<PendingCall<Op>>& call,
                        const Whereabouts& where) {
  const PublishRowsArgs& publication = call->publication;
  Attendance attendance = {
      .key = {},
      .print = Op::PrintOf(call->args),
      .rank = *where.rank,
      .num_ranks = static_cast<std::int32_t>(where.num_ranks),
      .lent = Op::LentBy(call->args),
      .make_work =
          [call](const PeerTables& tables) {
            Op::SetPeers(call->args, tables);
            return Op::MakeWork(call->args);
          },
      .done = [call](const auto& failure) { Complete(call->promise, failure); },
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
  const Whereabouts& where = reader.where();
  if (!reader.failed()) {
    reader.Require(*where.rank >= 0 && *where.rank < where.num_ranks,
                   "a rank of these");
  }
  const auto span = FindSpan(site, device, reader, *call);
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
      .run_id = run.run_id, .call_site = site->number, .group = *where.group};
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
