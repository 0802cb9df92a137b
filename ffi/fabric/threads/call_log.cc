// Implements call_log.h: the wording of the log's lines.

#include "fabric/threads/call_log.h"

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "fabric/threads/report.h"

namespace jax_ep {
namespace {

// "1.234 ms"
std::string Milliseconds(std::chrono::duration<double, std::milli> duration) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.3f ms", duration.count());
  return text.data();
}

std::string WhoIs(const Attendance& attendance) {
  std::string who = "rank " + std::to_string(attendance.rank) + " of " +
                    std::to_string(attendance.num_ranks);
  if (attendance.span) {
    who += " in process " + std::to_string(attendance.span->here);
  }
  return who;
}

std::string PlaceOf(const MeetingKey& key, const Span* span) {
  const std::int64_t run = span ? key.run_id - span->first_run : key.run_id;
  const std::int64_t call = span ? span->site : key.call_site;
  return "run " + std::to_string(run) + ", call " + std::to_string(call);
}

}  // namespace

LoggedCall::LoggedCall(std::string who, std::string op, std::string place)
    : who_(std::move(who)),
      op_(std::move(op)),
      place_(std::move(place)),
      came_(Clock::now()) {
  PrintLine("jax_ep: " + who_ + " came to " + op_ + " (" + place_ + ")");
}

void LoggedCall::NoteEpoch(std::uint64_t epoch) {
  place_ += ", epoch " + std::to_string(epoch);
}

void LoggedCall::NoteBeginning() { began_ = Clock::now(); }

void LoggedCall::NoteEnd(const std::optional<std::string>& failure) const {
  const std::string call = op_ + " (" + place_ + ")";
  if (failure) {
    PrintLine("jax_ep: " + who_ + " failed in " + call + " after " +
              Milliseconds(Clock::now() - came_) + ": " + *failure);
  } else {
    PrintLine("jax_ep: " + who_ + " left " + call + ": waited " +
              Milliseconds(began_.value_or(Clock::now()) - came_));
  }
}

Attendance Logged(const Attendance& attendance) {
  Attendance logged = attendance;
  const auto log =
      std::make_shared<LoggedCall>(WhoIs(attendance), attendance.print.op,
                                   PlaceOf(attendance.key, attendance.span.get()));
  logged.log = log;
  logged.done = [log, done = attendance.done](const auto& failure) {
    log->NoteEnd(failure);
    done(failure);
  };
  return logged;
}

}  // namespace jax_ep
