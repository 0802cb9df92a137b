#ifndef JAX_EP_FFI_BIND_CPU_EXCHANGE_H_
#define JAX_EP_FFI_BIND_CPU_EXCHANGE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/call_reader.h"
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
  std::int64_t number;
};

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
//   CallPrint PrintOf(const Args&), but for the plan

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
  ffi::Promise promise;
};

// Takes part in an exchange with the other devices of the process. Returns without
// waiting for them: XLA goes on with what does not need the result.
template <typename Op>
ffi::Future ExchangeDevices(const CallSite* site, ffi::RunId run, ffi::ThreadPool pool,
                            ffi::RemainingArgs operands, ffi::RemainingRets results,
                            ffi::Dictionary attributes) {
  const auto call = std::make_shared<PendingCall<Op>>();
  ffi::Future future(call->promise);
  CallReader reader(operands, results, attributes);
  call->args = Op::Read(reader);
  const Whereabouts& where = reader.where();
  if (!reader.failed()) {
    reader.Require(*where.rank >= 0 && *where.rank < where.num_ranks,
                   "a rank of these");
  }
  if (reader.failed()) {
    call->promise.SetError(reader.error());
    return future;
  }
  CallPrint print = Op::PrintOf(call->args);
  print.plan = *where.fingerprint;
  ProcessMeetingPoint().Attend({
      .key = {.run_id = run.run_id, .call_site = site->number, .group = *where.group},
      .print = print,
      .rank = *where.rank,
      .num_ranks = static_cast<std::int32_t>(where.num_ranks),
      .lent = Op::LentBy(call->args),
      .make_work =
          [call](const PeerTables& tables) {
            Op::SetPeers(call->args, tables);
            return Op::MakeWork(call->args);
          },
      .done = [call](const auto& failure) { Complete(call->promise, failure); },
      .schedule = ScheduleOn(pool),
  });
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
                                    .Ctx<xla::ffi::ThreadPool>()                      \
                                    .RemainingArgs()                                  \
                                    .RemainingRets()                                  \
                                    .Attrs())

#endif  // JAX_EP_FFI_BIND_CPU_EXCHANGE_H_
