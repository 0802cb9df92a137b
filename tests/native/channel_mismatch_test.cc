// Processes whose ranks call different things: what their errors say.

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "differing_calls.h"
#include "played_process.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

// Two processes of two ranks that call different things, each for itself in accord.
void CheckMismatch(const CallPrint& print, const std::string& described) {
  SimulatedJob job(2);
  job.AddGroup({0, 1, 1, 0});
  const auto start = Clock::now();
  OnThreads(4, [&](std::int64_t thread) {
    SpanCall call = {.rank = static_cast<std::int32_t>(thread)};
    if (thread == 1 || thread == 2) call.print = print;
    const std::string they = "ranks 1, 2 of process 1 called " + described;
    const std::string we = std::string("ranks 0, 3 of process 0 called ") + kUsualCall;
    const std::string own =
        ": rank " + Show(thread) + " of 4 gave up, because in epoch 1 ";
    const SpanOutcome outcome = job.Attend(call).Wait();
    // Who sees it first gives up; the other may see that instead.
    if (outcome.failure.value_or("").find("had given up") != std::string::npos) {
      CheckFailed(outcome, {own, "had given up, in epoch 1"});
    } else if (call.print == print) {
      CheckFailed(outcome, {own + they + " and " + we});
    } else {
      CheckFailed(outcome, {own + we + " and " + they});
    }
  });
  EP_CHECK(Clock::now() - start < kAtOnce);
}

EP_TEST(ProcessesThatCallDifferentThingsFail) {
  for (const DifferingCall& other : DifferingCalls()) {
    CheckMismatch(other.print, other.described);
  }
}

// All that the error can tell of it is how much: the calls are the same by name.
void CheckOtherSizes(std::vector<std::int64_t> bytes, const std::string& sizes) {
  Duel duel(1);
  duel.theirs.bytes = std::move(bytes);
  duel.peer.Publish(1, duel.theirs);
  CheckFailed(duel.job.Attend(duel.own).Wait(),
              {"in epoch 1 rank 0 of process 0 called " + std::string(kUsualCall) +
               " and rank 1 of process 1 called " + kUsualCall + sizes});
  duel.CheckIsOver({sizes});
}

EP_TEST(ProcessesThatLendDifferentBuffersFail) {
  CheckOtherSizes({256, 128},
                  "; a rank publishes 320 bytes in the one and 384 bytes in the other");
  CheckOtherSizes({256, 64, 0},
                  "; a rank lends 2 buffers in the one and 3 in the other");
  CheckOtherSizes({}, "; a rank lends 2 buffers in the one and 0 in the other");
  CheckOtherSizes(
      {64, 256},
      "; a rank publishes 320 bytes in both, but not the same of each buffer");
}

// A name longer than what processes share of it is cut, not run over.
EP_TEST(LongNamesAreTold) {
  const std::string name(200, 'x');
  Duel duel(1);
  duel.own.print.op = duel.theirs.print.op = name.c_str();
  duel.CheckExchange();
}

// The leader names a call that the others' ranks do not come to.
EP_TEST(CallThatTheLeaderAloneMakesIsNamed) {
  SimulatedJob job(2);
  job.AddGroup({0, 1});
  job.SetTimeout(1, kShort);
  const PendingSpanCall leading = job.Attend({.site = 5, .run_id = 9, .rank = 0});
  CheckFailed(
      job.Attend({.site = 6, .run_id = 9, .rank = 1}).Wait(),
      {"because in epoch 1 process 1 was waiting for its own ranks and process "
       "0, which leads, had named execution 9 of call 5, but 0.2 s later rank 1 of "
       "process 1 had come to " +
       std::string(kUsualCall) + " instead"});
  CheckFailed(leading.Wait(), {"rank 1 of process 1 had given up, in epoch 1, waiting "
                               "for its own ranks"});
}

}  // namespace
}  // namespace jax_ep
