// Implements process.h, and what Python asks of every library besides the handlers.
#include "bind/process/process.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "bind/process/call_site.h"
#include "bind/process/tell.h"
#include "fabric/processes/host.h"
#include "fabric/threads/call_log.h"
#include "fabric/threads/meeting.h"

namespace jax_ep {

MeetingPoint& ProcessMeetingPoint() {
  // Never destroyed: device threads may still be in it while the process exits.
  static auto* point = new MeetingPoint();
  return *point;
}

namespace {

std::atomic<std::int32_t> process_index{0};

// Never destroyed either, nor moved: others read what is on its board.
std::variant<std::unique_ptr<Host>, std::string>& TheHost() {
  static auto* host = new std::variant<std::unique_ptr<Host>, std::string>(Host::Create(
      ProcessIndex(), [] { return ProcessMeetingPoint().timeout(); },
      LaunchesInOrder()));
  return *host;
}

}  // namespace

std::int32_t ProcessIndex() { return process_index.load(std::memory_order_relaxed); }

Host* ProcessHost() {
  auto* host = std::get_if<std::unique_ptr<Host>>(&TheHost());
  return host == nullptr ? nullptr : host->get();
}

FirstRuns& ProcessFirstRuns() {
  static auto* runs = new FirstRuns([] { return ProcessMeetingPoint().timeout(); });
  return *runs;
}

}  // namespace jax_ep

// What Python asks of a library besides the handlers, by ctypes.
extern "C" {

xla::ffi::TypeId* jax_ep_call_site_type_id() { return &jax_ep::CallSite::id; }

const xla::ffi::TypeInfo* jax_ep_call_site_type_info() {
  return &jax_ep::CallSite::info;
}

int jax_ep_ffi_minor_version() { return XLA_FFI_API_MINOR; }

// Says which process of its job this is.
void jax_ep_set_process(std::int32_t index) {
  jax_ep::process_index.store(index, std::memory_order_relaxed);
}

// Writes this process's id and its board's number into `address`, or why it has no
// board into `problem`; returns whether it has one.
int jax_ep_board(std::int32_t* address, char* problem, int problem_bytes) {
  const auto& host = jax_ep::TheHost();
  if (const auto* why = std::get_if<std::string>(&host)) {
    jax_ep::Tell(*why, problem, problem_bytes);
    return 0;
  }
  const jax_ep::BoardAddress found = std::get<0>(host)->address();
  address[0] = found.process;
  address[1] = found.number;
  return 1;
}

// Opens the board of process `index` of the job, which has told its `address`.
int jax_ep_open_board(std::int32_t index, const std::int32_t* address, char* problem,
                      int problem_bytes) {
  const auto why =
      jax_ep::ProcessHost()->Open(index, {.process = address[0], .number = address[1]});
  if (!why) return 1;
  jax_ep::Tell(*why, problem, problem_bytes);
  return 0;
}

// For tests of faults: this process gets `signal`, or exits if that is 0, when it has
// entered a phase `skip` times and enters it once more.
void jax_ep_end_at(std::uint32_t phase, std::int64_t skip, int signal) {
  const auto left = std::make_shared<std::atomic<std::int64_t>>(skip);
  if (jax_ep::ProcessHost() == nullptr) return;
  jax_ep::ProcessHost()->set_on_phase([=](jax_ep::Phase entered, jax_ep::Epoch) {
    if (static_cast<std::uint32_t>(entered) != phase || left->fetch_sub(1) != 0) return;
    if (signal == 0) _exit(1);
    kill(getpid(), signal);
    // Signals take a moment to reach all threads.
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  });
}

// Returns whether calls were logged until now.
int jax_ep_log_calls(int enabled) { return jax_ep::SetLogsCalls(enabled != 0) ? 1 : 0; }

double jax_ep_wait_timeout() { return jax_ep::ProcessMeetingPoint().timeout().count(); }

double jax_ep_set_wait_timeout(double seconds) {
  const std::chrono::duration<double> timeout(seconds);
  return jax_ep::ProcessMeetingPoint().SetTimeout(timeout).count();
}

}  // extern "C"
