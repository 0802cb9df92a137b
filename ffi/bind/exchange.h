#ifndef JAX_EP_FFI_BIND_EXCHANGE_H_
#define JAX_EP_FFI_BIND_EXCHANGE_H_

#include <array>
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

// Operands of an exchange: those of all ranks along a leading axis, or of one device's.
// An Op has
//   explicit Op(CallReader&): reads and checks its own operands
//   Args At(i): the i-th rank's arguments, but for its peers' tables
//   Lent LentAt(i, const Args&): what that rank's peers read, of its buffers or its
//   Args static void SetPeers(Args&, const PeerTables&) static Work MakeWork(const
//   Args&) const char* name() and std::array<int64_t, 2> lent_dims(), for errors

// The arguments of ranks whose operands are stacked on one device.
template <typename Op>
class StackedRanks {
 public:
  StackedRanks(const Op& op, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) args_.push_back(op.At(i));
    for (std::int64_t i = 0; i < count; ++i) {
      const Lent lent = op.LentAt(i, args_[static_cast<std::size_t>(i)]);
      for (std::size_t j = 0; j < tables_.size(); ++j) tables_[j].push_back(lent[j]);
    }
    for (auto& args : args_) Op::SetPeers(args, {tables_[0].data(), tables_[1].data()});
  }
  StackedRanks(const StackedRanks&) = delete;
  StackedRanks& operator=(const StackedRanks&) = delete;

  const std::vector<typename Op::Args>& args() const { return args_; }

 private:
  std::array<std::vector<const void*>, 2> tables_;
  std::vector<typename Op::Args> args_;
};

// Runs an exchange of ranks whose operands are stacked on one device.
template <typename Op>
ffi::Error ExchangeStacked(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  const Op op(reader);
  if (reader.failed()) return reader.error();
  const StackedRanks<Op> ranks(op, reader.where().num_stacked);
  std::vector<Work> works;
  works.reserve(ranks.args().size());
  for (const auto& args : ranks.args()) works.push_back(Op::MakeWork(args));
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
  const Whereabouts& where = reader.where();
  const Op op(reader);
  if (reader.failed()) {
    call->promise.SetError(reader.error());
    return future;
  }
  call->args = op.At(0);
  ProcessMeetingPoint().Attend({
      .key = {.run_id = run.run_id, .call_site = site->number, .group = *where.group},
      .print = {.op = op.name(), .dims = op.lent_dims(), .plan = *where.fingerprint},
      .rank = *where.rank,
      .num_ranks = static_cast<std::int32_t>(where.num_ranks),
      .lent = op.LentAt(0, call->args),
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
#define EP_DEFINE_EXCHANGE(name, Op, Stacked)                                         \
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

#endif  // JAX_EP_FFI_BIND_EXCHANGE_H_
