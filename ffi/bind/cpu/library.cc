#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "bind/cpu/exchange.h"
#include "cpu/row_math.h"
#include "fabric/host.h"
#include "fabric/meeting.h"

namespace jax_ep {

ffi::TypeId CallSite::id = {};
const ffi::TypeInfo CallSite::info = ffi::MakeTypeInfo<CallSite>();

MeetingPoint& ProcessMeetingPoint() {
  // Never destroyed: device threads may still be in it while the process exits.
  static auto* point = new MeetingPoint();
  return *point;
}

namespace {

std::atomic<Host*> process_host{nullptr};
Host* unjoined_host = nullptr;

}  // namespace

Host* ProcessHost() { return process_host.load(std::memory_order_acquire); }

bool CallSite::IsNewTo(std::int32_t device) {
  const std::scoped_lock lock(mutex_);
  return devices_.insert(device).second;
}

std::variant<std::shared_ptr<const Span>, std::string> CallSite::SpanOf(
    std::int32_t device, std::int32_t group, const std::int32_t* roll,
    std::int64_t num_ranks) {
  const std::scoped_lock lock(mutex_);
  const bool is_told = roll[0] >= 0;
  if (!is_told) {
    const auto known = spans_.find(device);
    if (known != spans_.end()) return known->second;
    return "the program's first run failed before its ranks had told each other where "
           "they are: compile it anew";
  }
  Host& host = *ProcessHost();
  Span span = {
      .process_of = {}, .here = host.here(), .site = roll[1], .relay = nullptr};
  for (std::int64_t rank = 0; rank < num_ranks; ++rank) {
    span.process_of.push_back(roll[2 * rank]);
  }
  std::shared_ptr<const Span> known;  // null if all ranks are here
  if (std::ranges::any_of(span.process_of, [&](auto p) { return p != span.here; })) {
    span.relay = host.ChannelOf(span.process_of, group);
    known = std::make_shared<const Span>(std::move(span));
  }
  spans_[device] = known;
  return known;
}

SpanningCall ReadSpanningCall(CallReader& reader) {
  const std::int64_t num_ranks = reader.where().num_ranks;
  return {
      .roll = reader.Operand<std::int32_t>("roll", ffi::DataType::S32, num_ranks * 2),
      .recv_row = reader.Operand<std::int32_t>("recv_row", ffi::DataType::S32,
                                               reader.Attribute("published_rows")),
      .recv_counts = reader.Operand<std::int32_t>(
          "recv_counts", ffi::DataType::S32,
          reader.Attribute("published_rows") > 0 ? num_ranks : 0)};
}

Schedule ScheduleOn(ffi::ThreadPool& pool) {
  return [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
}

void Complete(ffi::Promise promise, const std::optional<std::string>& failure) {
  if (failure) {
    promise.SetError({ffi::ErrorCode::kDeadlineExceeded, "jax_ep " + *failure});
  } else {
    promise.SetAvailable();
  }
}

namespace {

ffi::ErrorOr<std::unique_ptr<CallSite>> NewCallSite() {
  static std::atomic<std::int64_t> next{0};
  auto site = std::make_unique<CallSite>();
  site->number = next.fetch_add(1, std::memory_order_relaxed);
  return site;
}

// What a device says when it runs a call for the first time: in which process it is,
// and the number of the call there. Later it says -1. The other operands are there so
// that calls with different ones are different calls to XLA.
ffi::Error RollCall(CallSite* site, std::int32_t device, ffi::RemainingArgs,
                    ffi::Result<ffi::BufferR1<ffi::DataType::S32>> said) {
  const bool is_new = site->IsNewTo(device);
  if (said->element_count() != 2)
    return ffi::Error::InvalidArgument("jax_ep: bad call");
  said->typed_data()[0] = is_new ? ProcessHost()->here() : -1;
  said->typed_data()[1] = is_new ? static_cast<std::int32_t>(site->number) : -1;
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_new_call_site, jax_ep::NewCallSite,
                              xla::ffi::Ffi::BindInstantiate());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_roll_call, jax_ep::RollCall,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::State<jax_ep::CallSite>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::DataType::S32>>());

// What Python asks of the library besides the handlers, by ctypes.
extern "C" {

xla::ffi::TypeId* jax_ep_call_site_type_id() { return &jax_ep::CallSite::id; }

const xla::ffi::TypeInfo* jax_ep_call_site_type_info() {
  return &jax_ep::CallSite::info;
}

int jax_ep_ffi_minor_version() { return XLA_FFI_API_MINOR; }

const char* jax_ep_instruction_set() { return jax_ep::BestRowMath().instruction_set; }

// Makes this process's board. Writes its process id and number into `address`, or why
// there is none into `problem`; returns whether there is one.
int jax_ep_open_board(std::int32_t* address, char* problem, int problem_bytes) {
  static auto host =
      jax_ep::Host::Create([] { return jax_ep::ProcessMeetingPoint().timeout(); });
  if (const auto* why = std::get_if<std::string>(&host)) {
    std::snprintf(problem, static_cast<std::size_t>(problem_bytes), "%s", why->c_str());
    return 0;
  }
  jax_ep::unjoined_host = std::get<0>(host).get();
  const jax_ep::BoardAddress found = jax_ep::unjoined_host->address();
  address[0] = found.process;
  address[1] = found.number;
  return 1;
}

// Opens the boards of all processes of the job, of which this is number `here`. Each
// has two numbers in `addresses`, as above. To be called once, after jax_ep_open_board.
int jax_ep_join(std::int32_t here, std::int32_t num_processes,
                const std::int32_t* addresses, char* problem, int problem_bytes) {
  std::vector<jax_ep::BoardAddress> boards(static_cast<std::size_t>(num_processes));
  for (jax_ep::BoardAddress& board : boards) {
    board = {.process = addresses[0], .number = addresses[1]};
    addresses += 2;
  }
  if (const auto why = jax_ep::unjoined_host->Join(here, boards)) {
    std::snprintf(problem, static_cast<std::size_t>(problem_bytes), "%s", why->c_str());
    return 0;
  }
  jax_ep::process_host.store(jax_ep::unjoined_host, std::memory_order_release);
  return 1;
}

// For tests of faults: this process gets `signal`, or exits if that is 0, when it has
// entered a phase `skip` times and enters it once more.
void jax_ep_end_at(std::uint32_t phase, std::int64_t skip, int signal) {
  const auto left = std::make_shared<std::atomic<std::int64_t>>(skip);
  jax_ep::ProcessHost()->set_on_phase([=](jax_ep::Phase entered, jax_ep::Epoch) {
    if (static_cast<std::uint32_t>(entered) != phase || left->fetch_sub(1) != 0) return;
    if (signal == 0) _exit(1);
    kill(getpid(), signal);
    // Signals take a moment to reach all threads.
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  });
}

double jax_ep_wait_timeout() { return jax_ep::ProcessMeetingPoint().timeout().count(); }

double jax_ep_set_wait_timeout(double seconds) {
  const std::chrono::duration<double> timeout(seconds);
  return jax_ep::ProcessMeetingPoint().SetTimeout(timeout).count();
}

}  // extern "C"
