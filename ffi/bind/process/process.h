// What there is once in a process, for all fabrics whose ranks are on several devices.
#ifndef JAX_EP_FFI_BIND_PROCESS_PROCESS_H_
#define JAX_EP_FFI_BIND_PROCESS_PROCESS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "fabric/processes/first_runs.h"
#include "fabric/processes/host.h"
#include "fabric/threads/meeting.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Where the devices of this process meet.
MeetingPoint& ProcessMeetingPoint();

// This process among the others of its job.
std::int32_t ProcessIndex();

// Whether XLA launches what a device does in one order, the same in all processes that
// run the same programs: as the library's platform has it.
bool LaunchesInOrder();

// What it shows to them; it comes to be when they first need it. Null if it cannot.
Host* ProcessHost();

FirstRuns& ProcessFirstRuns();

// The error of a call whose peers did not come, or came to something else.
inline xla::ffi::Error MeetingError(const std::string& failure) {
  return {xla::ffi::ErrorCode::kDeadlineExceeded, "jax_ep " + failure};
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_PROCESS_PROCESS_H_
