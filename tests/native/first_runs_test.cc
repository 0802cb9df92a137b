// Ranks of two processes agree to run a call for the first time: `FirstRuns`, with the
// boards of two hosts that are in this one process.

#include "fabric/processes/first_runs.h"

#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "check.h"
#include "fabric/processes/host.h"
#include "fabric/threads/call_log.h"
#include "stderr_pipe.h"
#include "threads.h"

namespace jax_ep {
namespace {

using std::chrono::duration;

constexpr duration<double> kLong{60};
constexpr duration<double> kShort{0.2};

// A process with one rank of two.
class Side {
 public:
  Side(std::int32_t here, duration<double> timeout)
      : here_(here), runs_([timeout] { return timeout; }) {
    auto host = Host::Create(here, [timeout] { return timeout; });
    host_ = std::move(std::get<std::unique_ptr<Host>>(host));
  }

  Host& host() { return *host_; }
  FirstRuns& runs() { return runs_; }

  std::future<FirstRuns::Outcome> Begin(std::int64_t site = 0) {
    const auto told = std::make_shared<std::promise<FirstRuns::Outcome>>();
    runs_.Await(
        *host_,
        {.call = "dispatch",
         .kind = 5,
         .group = 7,
         .run_id = 100 + site,
         .site = site,
         .rank = here_,
         .process_of = {0, 1}},
        [told](const FirstRuns::Outcome& outcome) { told->set_value(outcome); });
    return told->get_future();
  }

 private:
  const std::int32_t here_;
  std::unique_ptr<Host> host_;
  FirstRuns runs_;
};

void Introduce(Side& one, Side& other) {
  for (Side* side : {&one, &other}) {
    for (Side* shown : {&one, &other}) {
      const auto problem =
          side->host().Open(shown->host().here(), shown->host().address());
      EP_CHECK_EQ(problem.value_or(""), "");
    }
  }
}

void CheckNew(std::future<FirstRuns::Outcome> told) {
  const FirstRuns::Outcome outcome = told.get();
  EP_CHECK_EQ(outcome.failure.value_or(""), "");
  EP_CHECK(!outcome.known);
}

EP_TEST(BothAreTold) {
  Side one(0, kLong);
  Side other(1, kLong);
  Introduce(one, other);
  for (int turn = 0; turn < 3; ++turn) {
    auto first = one.Begin();
    EP_CHECK(first.wait_for(kShort) == std::future_status::timeout);
    auto second = other.Begin();
    CheckNew(std::move(first));
    CheckNew(std::move(second));
  }
}

// Independent calls of one program, which each process comes to in an order of its own.
EP_TEST(CallsAtOnceInAnyOrder) {
  Side one(0, kLong);
  Side other(1, kLong);
  Introduce(one, other);
  OnThreads(2, [&](std::int64_t thread) {
    Side& side = thread == 0 ? one : other;
    std::vector<std::future<FirstRuns::Outcome>> told;
    for (std::int64_t i = 0; i < 20; ++i) {
      told.push_back(side.Begin(thread == 0 ? i : 19 - i));
    }
    for (auto& outcome : told) CheckNew(std::move(outcome));
  });
}

EP_TEST(WhoIsAloneGivesUpAndMayBeginAgain) {
  Side one(0, kShort);
  Side other(1, kLong);
  Introduce(one, other);
  for (int turn = 0; turn < 2; ++turn) {
    auto alone = one.Begin();
    const FirstRuns::Outcome outcome = alone.get();
    EP_CHECK_EQ(
        outcome.failure.value_or(""),
        "dispatch: rank 0 of 2 gave up, because it runs this call for the first "
        "time since it was compiled, and rank 1 of process 1 did not do so "
        "within 0.2 s");
  }
  // Nothing is left of it: the next one is not met by what was given up.
  auto second = other.Begin();
  EP_CHECK(second.wait_for(kShort) == std::future_status::timeout);
  CheckNew(one.Begin());
  CheckNew(std::move(second));
}

// Several at once: one that is given up is not counted by those after it.
EP_TEST(OneOfSeveralGivesUp) {
  Side one(0, kShort);
  Side other(1, kLong);
  Introduce(one, other);
  auto first = one.Begin(1);
  std::this_thread::sleep_for(kShort / 2);
  auto second = one.Begin(2);
  EP_CHECK(first.get().failure.has_value());
  auto theirs = other.Begin(2);
  CheckNew(std::move(second));
  CheckNew(std::move(theirs));
}

EP_TEST(CallsAreRemembered) {
  Side side(0, kLong);
  const FirstRun run = {
      .call = "dispatch", .kind = 5, .group = 7, .run_id = 3, .process_of = {}};
  side.runs().Remember(run, {.number = 11, .first_run = 3});
  side.runs().Remember(run, {.number = 11, .first_run = 4});
  const auto found = side.runs().Find(7, 11);
  EP_CHECK(found.has_value());
  EP_CHECK_EQ(found->first_run, 3);
  EP_CHECK(!side.runs().Find(7, 12));
  EP_CHECK(!side.runs().Find(8, 11));
}

EP_TEST(FirstRunsAreLogged) {
  StderrPipe pipe;
  Side one(0, kShort);
  Side other(1, kLong);
  Introduce(one, other);
  SetLogsCalls(true);
  const FirstRuns::Outcome outcome = one.Begin(3).get();
  SetLogsCalls(false);
  EP_CHECK(outcome.failure.has_value());
  const std::string text = pipe.Read();
  const std::string where =
      " the first run of dispatch (run 103, call 3 of this process)";
  for (const std::string& part :
       {"jax_ep: rank 0 of 2 in process 0 came to" + where + "\n",
        "jax_ep: rank 0 of 2 in process 0 failed in" + where + " after ",
        "ms: " + outcome.failure.value_or("")}) {
    const Case which("looking for \"" + part + "\" in \"" + text + "\"");
    EP_CHECK(text.find(part) != std::string::npos);
  }
}

}  // namespace
}  // namespace jax_ep
