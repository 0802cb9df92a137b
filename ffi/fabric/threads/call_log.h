// A log of who comes to which call and how long it waits there, to find out why a
// program hangs. Written by meeting points and by first runs; Python switches it.

#ifndef JAX_EP_FFI_FABRIC_THREADS_CALL_LOG_H_
#define JAX_EP_FFI_FABRIC_THREADS_CALL_LOG_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "fabric/threads/attendance.h"

namespace jax_ep {

// Whether calls that begin now are logged; off until set. Relaxed: it orders nothing.
inline std::atomic<bool> logs_calls{false};
inline bool LogsCalls() { return logs_calls.load(std::memory_order_relaxed); }

// Returns whether they were until now.
inline bool SetLogsCalls(bool enabled) {
  return logs_calls.exchange(enabled, std::memory_order_relaxed);
}

// One rank's call in the log, which has a line on stderr of its coming and one of its
// end. Other threads may see it once the thread that changed it has told them.
class LoggedCall {
 public:
  // Says that it came: `who`, "rank 3 of 8", to `op`, "dispatch", at `place`,
  // "run 12, call 4".
  LoggedCall(std::string who, std::string op, std::string place);

  // Which exchange between processes it is.
  void NoteEpoch(std::uint64_t epoch);
  // All peers have come, and the works begin.
  void NoteBeginning();
  // Says that it ended, and how long it waited before the works began, if they did.
  void NoteEnd(const std::optional<std::string>& failure) const;

 private:
  using Clock = std::chrono::steady_clock;

  const std::string who_;
  const std::string op_;
  std::string place_;
  const Clock::time_point came_;
  std::optional<Clock::time_point> began_;
};

// Returns the same attendance, logged: its coming at once, its end when it is done.
// Between processes runs are counted from the one in which the ranks agreed on the
// call, so that all processes say the same of it.
Attendance Logged(const Attendance& attendance);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_THREADS_CALL_LOG_H_
