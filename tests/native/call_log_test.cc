// What the log says of calls that end and of calls that fail.
#include "fabric/threads/call_log.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "captured_reports.h"
#include "check.h"
#include "fabric/threads/meeting.h"
#include "meeting_calls.h"
#include "simulated_processes.h"
#include "stderr_pipe.h"
#include "threads.h"

namespace jax_ep {
namespace {

// The log's lines while it lives, in place of stderr.
class Log {
 public:
  Log() { EP_CHECK(!SetLogsCalls(true)); }
  ~Log() { SetLogsCalls(false); }
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;

  // Returns all lines, after which nothing more is written.
  std::vector<std::string> Lines() {
    std::vector<std::string> lines;
    std::istringstream text(pipe_.Read());
    for (std::string line; std::getline(text, line);) lines.push_back(line);
    return lines;
  }

 private:
  StderrPipe pipe_;
};

// Checks that a line is `before`, milliseconds with three decimals, and `after`;
// returns the milliseconds.
double CheckTime(const std::string& line, const std::string& before,
                 const std::string& after = " ms") {
  const Case which("\"" + line + "\" should be \"" + before + "N" + after + "\"");
  if (!EP_CHECK(line.starts_with(before)) || !EP_CHECK(line.ends_with(after)))
    return -1;
  if (!EP_CHECK(line.size() > before.size() + after.size())) return -1;
  const std::string time =
      line.substr(before.size(), line.size() - before.size() - after.size());
  EP_CHECK_EQ(time.find_first_not_of("0123456789."), std::string::npos);
  EP_CHECK(time.front() != '.');
  EP_CHECK_EQ(time.find('.') + 4, time.size());
  return std::stod(time);
}

Call CallOf(std::int32_t rank) {
  return {
      .key = {.run_id = 12, .call_site = 4, .group = 0}, .rank = rank, .num_ranks = 2};
}

EP_TEST(NothingIsLoggedUntilSwitchedOn) {
  EP_CHECK(!LogsCalls());
  StderrPipe pipe;
  MeetingPoint point;
  const PendingCall first(point, CallOf(0), AtOnce);
  CheckWorked(CallOf(1), PendingCall(point, CallOf(1), AtOnce).Wait());
  CheckWorked(CallOf(0), first.Wait());
  EP_CHECK_EQ(pipe.Read(), "");
}

EP_TEST(SwitchTellsWhatItWas) {
  EP_CHECK(!SetLogsCalls(true));
  EP_CHECK(SetLogsCalls(true));
  EP_CHECK(SetLogsCalls(false));
  EP_CHECK(!SetLogsCalls(false));
}

EP_TEST(LogSaysWhoCameAndHowLongItWaited) {
  Log log;
  MeetingPoint point;
  const PendingCall first(point, CallOf(0), AtOnce);
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CheckWorked(CallOf(1), PendingCall(point, CallOf(1), AtOnce).Wait());
  CheckWorked(CallOf(0), first.Wait());
  const std::vector<std::string> lines = log.Lines();
  if (!EP_CHECK_EQ(lines.size(), 4)) return;
  EP_CHECK_EQ(lines[0], "jax_ep: rank 0 of 2 came to dispatch (run 12, call 4)");
  EP_CHECK_EQ(lines[1], "jax_ep: rank 1 of 2 came to dispatch (run 12, call 4)");
  const std::string left = " of 2 left dispatch (run 12, call 4): waited ";
  EP_CHECK(CheckTime(lines[2], "jax_ep: rank 0" + left) >= 300);
  // The last to come waits for nobody.
  const double last = CheckTime(lines[3], "jax_ep: rank 1" + left);
  EP_CHECK(0 <= last && last < 300);
}

// Of a program that hangs, who came and did not leave waits for who did not come.
EP_TEST(RankThatWaitsHasNotLeft) {
  Log log;
  MeetingPoint point;
  const PendingCall waiting(point, CallOf(1), AtOnce);
  EP_CHECK(!waiting.HasEnded());
  EP_CHECK_EQ(Show(log.Lines()),
              "[jax_ep: rank 1 of 2 came to dispatch (run 12, call 4)]");
}

EP_TEST(FailedCallIsLogged) {
  Log log;
  const CapturedReports reports;
  MeetingPoint point;
  point.SetTimeout(std::chrono::milliseconds(50));
  CheckFailed(PendingCall(point, CallOf(0), AtOnce).Wait(), {"for rank 1 to come"});
  const std::vector<std::string> lines = log.Lines();
  if (!EP_CHECK_EQ(lines.size(), 2)) return;
  EP_CHECK(CheckTime(lines[1],
                     "jax_ep: rank 0 of 2 failed in dispatch (run 12, call 4) after ",
                     " ms: dispatch: rank 0 of 2 gave up, because rank 0 "
                     "waited 0.1 s for rank 1 to come") >= 50);
}

EP_TEST(LogBetweenProcessesNamesProcessAndEpoch) {
  Log log;
  SimulatedJob job(2);
  job.AddGroup({0, 1});
  OnThreads(2, [&](std::int64_t rank) {
    SpanCall call = {.site = 3, .run_id = 9, .rank = static_cast<std::int32_t>(rank)};
    for (call.turn = 0; call.turn < 2; ++call.turn) job.Works(call);
  });
  const std::vector<std::string> lines = log.Lines();
  EP_CHECK_EQ(lines.size(), 8);
  for (std::int64_t rank = 0; rank < 2; ++rank) {
    const std::string who =
        "jax_ep: rank " + Show(rank) + " of 2 in process " + Show(rank);
    std::vector<std::string> own;
    for (const std::string& line : lines) {
      if (line.starts_with(who)) own.push_back(line);
    }
    if (!EP_CHECK_EQ(own.size(), 4)) return;
    for (std::size_t turn = 0; turn < 2; ++turn) {
      EP_CHECK_EQ(own[2 * turn], who + " came to dispatch (run 9, call 3)");
      CheckTime(own[2 * turn + 1], who + " left dispatch (run 9, call 3, epoch " +
                                       Show(turn + 1) + "): waited ");
    }
  }
}

}  // namespace
}  // namespace jax_ep
