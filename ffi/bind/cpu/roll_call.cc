// Implements first_run.h, and the call by which ranks of several processes agree on
// one.
#include <cstdint>
#include <utility>

#include "bind/cpu/first_run.h"
#include "bind/cpu/meeting_call.h"
#include "bind/handler_list.h"
#include "bind/process/call_site.h"
#include "bind/process/process.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

FirstRun DescribeRun(CallReader& reader, const Group& group, std::int64_t run_id) {
  const Whereabouts& where = reader.where();
  FirstRun run;
  run.call = where.call;
  run.group = group.id;
  run.run_id = run_id;
  if (reader.failed()) return run;
  run.kind = static_cast<std::uint64_t>(reader.Attribute("kind"));
  run.rank = *where.rank;
  run.process_of = group.Processes();
  return run;
}

namespace {

std::int32_t* ReadSaid(CallReader& reader) {
  return reader.Result<std::int32_t>("number", 1);
}

// What a device says when it runs a call for the first time: this call's number, for
// all ranks to take that of the first one. -1 if they have agreed on it before or are
// all in this process; -2 - n if others know it as number n.
ffi::Future RollCall(CallSite* site, ffi::RunId run, std::int32_t device,
                     ffi::RemainingArgs operands, ffi::RemainingRets results,
                     ffi::Dictionary attributes) {
  ffi::Promise promise;
  ffi::Future future(promise);
  CallReader reader(operands, results, attributes);
  if (reader.failed()) {
    promise.SetError(reader.error());
    return future;
  }
  const Group group = FindGroup(reader, device, RoleOf(reader.where()));
  auto* said = ReadSaid(reader);
  if (!reader.failed()) *said = -1;
  if (reader.failed() || !group.Spans(ProcessIndex()) || !site->IsNewTo(device)) {
    reader.failed() ? promise.SetError(reader.error()) : promise.SetAvailable();
    return future;
  }
  FirstRun first = DescribeRun(reader, group, run.run_id);
  first.site = site->number;
  if (reader.failed()) {
    promise.SetError(reader.error());
    return future;
  }
  const auto number = static_cast<std::int32_t>(site->number);
  const auto told = [said, number, promise](const FirstRuns::Outcome& outcome) {
    *said =
        outcome.known ? static_cast<std::int32_t>(-2 - outcome.known->number) : number;
    Complete(promise, outcome.failure);
  };
  ProcessFirstRuns().Await(*ProcessHost(), std::move(first), told);
  return future;
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_roll_call, jax_ep::RollCall,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::State<jax_ep::CallSite>>()
                                  .Ctx<xla::ffi::RunId>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());

EP_LIST_HANDLER(roll_call, jax_ep::ReadSaid, {"instantiate", "jax_ep_new_call_site"},
                {"execute", "jax_ep_roll_call"})
