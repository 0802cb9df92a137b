// The fabric of ranks on the CPU devices of one process: they meet on the host, and
// read each other's buffers where XLA has put them.
#include <cstdint>
#include <memory>

#include "bind/cpu/meeting_call.h"
#include "bind/ops.h"

namespace jax_ep {
namespace {

// All that is read of a call: the members by FindGroup.
template <typename Op>
void Ask(CallReader& reader) {
  reader.List("members");
  Op::Read(reader);
}

template <typename Op>
ffi::Future ExchangeDevices(CallSite* site, ffi::RunId run, std::int32_t device,
                            ffi::ThreadPool pool, ffi::RemainingArgs operands,
                            ffi::RemainingRets results, ffi::Dictionary attributes) {
  const auto pending = std::make_shared<PendingCall<Op>>();
  ffi::Future future(pending->promise);
  CallReader reader(operands, results, attributes);
  pending->call = Op::Read(reader);
  Meet(pending, reader, {.site = site, .run = run, .device = device}, pool,
       [](const Arrival&, Attendance&) {});
  return future;
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_DEVICES(name, Op)                                             \
  EP_DEFINE_MEETING_HANDLER(name, devices, jax_ep::ExchangeDevices<jax_ep::Op>, \
                            jax_ep::Ask<jax_ep::Op>)

EP_FOR_EACH_OP(EP_DEFINE_DEVICES)
