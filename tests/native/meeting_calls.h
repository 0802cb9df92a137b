// Ranks on threads of their own that meet again and again, for the tests of meetings.

#ifndef JAX_EP_TESTS_NATIVE_MEETING_CALLS_H_
#define JAX_EP_TESTS_NATIVE_MEETING_CALLS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fabric/threads/meeting.h"

namespace jax_ep {

// One rank's call: it lends some numbers, and in each of its chunks, which are those of
// two works, adds up those of all.
struct Call {
  MeetingKey key = {.run_id = 1, .call_site = 1, .group = 0};
  CallPrint print = {.op = "dispatch", .rows = 64, .row_bytes = 256, .plan = 7};
  std::int32_t rank = 0;
  std::int32_t num_ranks = 1;
  std::int64_t turn = 0;  // how often it made this call before
  std::int64_t num_lent = 2;
  std::int64_t num_chunks = 1;
};

// What came of it.
struct Outcome {
  std::optional<std::string> failure;
  std::vector<std::uint64_t> sums;  // [num_chunks]
};

using Next = std::function<void(const Outcome&)>;

// Makes the call; `next` is run once, when it has ended. First what was lent is freed,
// so that a peer that still reads it is caught.
void Attend(MeetingPoint& point, const Call& call, const Schedule& schedule, Next next);

// A call that somebody waits for, or that never ends.
class PendingCall {
 public:
  PendingCall(MeetingPoint& point, const Call& call, const Schedule& schedule);
  bool HasEnded() const;
  const Outcome& Wait() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

// Runs what it is given on the thread that gives it, as a full thread pool does.
void AtOnce(const std::function<void()>& task);

// Checks that the call worked and came to the right sums.
void CheckWorked(const Call& call, const Outcome& outcome);

// Checks that the call failed, before any work, with an error that has all parts in it.
void CheckFailed(const Outcome& outcome, const std::vector<std::string>& parts);

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_MEETING_CALLS_H_
