// What there is once in a process, for all fabrics whose ranks are on several devices.
#ifndef JAX_EP_FFI_BIND_PROCESS_PROCESS_H_
#define JAX_EP_FFI_BIND_PROCESS_PROCESS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "bind/ops.h"
#include "fabric/processes/first_runs.h"
#include "fabric/processes/host.h"
#include "fabric/threads/attendance.h"
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

// Has a rank bring what it lends to a meeting. All ranks must agree on how much.
inline void AddLent(const std::vector<LentRows>& buffers, Attendance& attendance) {
  for (const LentRows& lent : buffers) {
    attendance.lent.push_back({.data = lent.data, .shared_bytes = lent.bytes()});
    if (attendance.lent.size() == 1) attendance.print.rows = lent.num_rows;
    attendance.print.row_bytes += lent.row_bytes;
  }
}

// The error of a call whose peers did not come, or came to something else.
inline xla::ffi::Error MeetingError(const std::string& failure) {
  return {xla::ffi::ErrorCode::kDeadlineExceeded, "jax_ep " + failure};
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_PROCESS_PROCESS_H_
