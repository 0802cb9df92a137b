// What Python asks of a library's recorder of calls, by ctypes.
#include <cstddef>
#include <cstdint>

#include "fabric/threads/recorder.h"

extern "C" {

// Returns whether calls were recorded until now.
int jax_ep_record_calls(int enabled) {
  // What is to hold the records is there before the first call needs it.
  jax_ep::ProcessRecorder();
  return jax_ep::SetRecordsCalls(enabled != 0) ? 1 : 0;
}

std::int64_t jax_ep_record_bytes() { return sizeof(jax_ep::CallRecord); }

// How many records there were until now.
std::int64_t jax_ep_num_records() {
  return static_cast<std::int64_t>(jax_ep::ProcessRecorder().count());
}

// Copies the records from number `from` on that are still there; returns how many.
std::int64_t jax_ep_read_records(std::int64_t from, jax_ep::CallRecord* room,
                                 std::int64_t count) {
  return static_cast<std::int64_t>(jax_ep::ProcessRecorder().Read(
      static_cast<std::uint64_t>(from), {room, static_cast<std::size_t>(count)}));
}

}  // extern "C"
