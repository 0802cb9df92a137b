// The fabric of ranks on the CPU devices of one process: they meet on the host, and
// read each other's buffers where XLA has put them.
#include <cstdint>
#include <memory>

#include "bind/cpu/meeting_call.h"
#include "bind/handler_list.h"
#include "bind/ops.h"

namespace jax_ep {
namespace {

template <typename Op>
typename Op::Call ReadCall(CallReader& reader) {
  reader.List("members");
  return Op::Read(reader);
}

// Takes part in an exchange with the other devices. Returns without waiting for them:
// XLA goes on with what does not need the result.
template <typename Op>
ffi::Future ExchangeDevices(CallSite* site, ffi::RunId run, std::int32_t device,
                            ffi::ThreadPool pool, ffi::RemainingArgs operands,
                            ffi::RemainingRets results, ffi::Dictionary attributes) {
  const auto pending = std::make_shared<PendingCall<Op>>();
  ffi::Future future(pending->promise);
  CallReader reader(operands, results, attributes);
  pending->call = ReadCall<Op>(reader);
  NoteFaultsIn(pending->fault, pending->call);
  const Group group = FindGroup(reader, device);
  if (reader.failed()) {
    pending->promise.SetError(reader.error());
    return future;
  }
  const Arrival arrival = {.site = site, .run = run, .device = device, .group = group};
  Attendance attendance = AttendanceOf(pending, reader.where(), arrival);
  attendance.schedule = ScheduleOn(pool);
  ProcessMeetingPoint().Attend(attendance);
  return future;
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_DEVICES(name, Op)                                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_devices,                      \
                                jax_ep::ExchangeDevices<jax_ep::Op>,          \
                                xla::ffi::Ffi::Bind()                         \
                                    .Ctx<xla::ffi::State<jax_ep::CallSite>>() \
                                    .Ctx<xla::ffi::RunId>()                   \
                                    .Ctx<xla::ffi::DeviceOrdinal>()           \
                                    .Ctx<xla::ffi::ThreadPool>()              \
                                    .RemainingArgs()                          \
                                    .RemainingRets()                          \
                                    .Attrs());                                \
  EP_LIST_HANDLER(name##_devices, jax_ep::ReadCall<jax_ep::Op>,               \
                  {"instantiate", "jax_ep_new_call_site"},                    \
                  {"execute", "jax_ep_" #name "_devices"})

EP_FOR_EACH_OP(EP_DEFINE_DEVICES)
