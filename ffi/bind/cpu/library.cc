#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bind/cpu/exchange.h"
#include "cpu/row_math.h"
#include "fabric/meeting.h"

namespace jax_ep {

ffi::TypeId CallSite::id = {};
const ffi::TypeInfo CallSite::info = ffi::MakeTypeInfo<CallSite>();

MeetingPoint& ProcessMeetingPoint() {
  // Never destroyed: device threads may still be in it while the process exits.
  static auto* point = new MeetingPoint();
  return *point;
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

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_new_call_site, jax_ep::NewCallSite,
                              xla::ffi::Ffi::BindInstantiate());

// What Python asks of the library besides the handlers, by ctypes.
extern "C" {

xla::ffi::TypeId* jax_ep_call_site_type_id() { return &jax_ep::CallSite::id; }

const xla::ffi::TypeInfo* jax_ep_call_site_type_info() {
  return &jax_ep::CallSite::info;
}

int jax_ep_ffi_minor_version() { return XLA_FFI_API_MINOR; }

const char* jax_ep_instruction_set() { return jax_ep::BestRowMath().instruction_set; }

double jax_ep_set_wait_timeout(double seconds) {
  const std::chrono::duration<double> timeout(seconds);
  return jax_ep::ProcessMeetingPoint().SetTimeout(timeout).count();
}

}  // extern "C"
