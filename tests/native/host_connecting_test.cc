// The first exchange of a group: processes that do not come to it, give up before it or
// have no memory for it, and boards that cannot be had.

#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "check.h"
#include "fabric/processes/host.h"
#include "forked_processes.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

using std::chrono::duration;

// It waits for its first exchange where the memory of others is not known yet.
EP_TEST(ProcessThatDoesNotConnectIsNamed) {
  Child child(1, kLong, [](Side&) {
    for (;;) pause();
    return false;
  });
  Side own(0, duration<double>(0.3));
  child.Join(own, 0);
  CheckFailed(own.Make({}, kOneEach),
              {"in epoch 1 process 0 was connecting and process 1 (pid " +
               Show(child.process()) +
               ") had not come to the first exchange of these ranks in time"});
}

// Its own rank does not come to its very first exchange: the other waits in vain for
// more than its time-out only if it is not told.
EP_TEST(ProcessThatGivesUpBeforeItConnectsIsNamedAtOnce) {
  const std::vector<std::int32_t> process_of = {0, 1, 1};
  Child child(1, duration<double>(0.3), [&](Side& side) {
    const bool failed = side.Make({}, process_of, 2).failure.has_value();
    for (;;) pause();
    return failed;
  });
  Side own(0, kLong);
  child.Join(own, 0);
  const auto start = Clock::now();
  CheckFailed(own.Make({}, process_of),
              {"ranks 1, 2 of process 1 had given up, in epoch 1"});
  EP_CHECK(Clock::now() - start < 3 * kSoon);
}

// As many files as it may have are open: it has no window, but words that say so.
EP_TEST(ProcessWithoutAWindowIsNamedAtOnce) {
  Child child(1, kLong, [](Side& side) {
    const rlimit none = {.rlim_cur = 0, .rlim_max = 0};
    if (setrlimit(RLIMIT_NOFILE, &none) != 0) return false;
    const SpanOutcome outcome = side.Make({}, kOneEach);
    return CheckFailed(outcome,
                       {"in epoch 1 process 1 was connecting and could not make its "
                        "window: memfd_create: Too many open files"});
  });
  Side own(0, kLong);
  child.Join(own, 0);
  const auto start = Clock::now();
  CheckFailed(own.Make({}, kOneEach),
              {"in epoch 1 process 0 was connecting and process 1 (pid " +
               Show(child.process()) + ") has given up"});
  EP_CHECK(Clock::now() - start < 3 * kSoon);
  EP_CHECK(child.Ended());
}

// While it waits for one process that does not come, it is told by another that gave
// up.
EP_TEST(ProcessThatGivesUpEndsTheWaitForAThird) {
  const std::vector<std::int32_t> process_of = {0, 1, 1, 2};
  // Three hosts of one process: the last does nothing.
  std::vector<std::unique_ptr<Side>> sides;
  std::vector<BoardAddress> boards;
  for (const std::int32_t here : {0, 1, 2}) {
    sides.push_back(
        std::make_unique<Side>(here, here == 1 ? duration<double>(0.3) : kLong));
    boards.push_back(sides.back()->address());
  }
  for (const auto& side : sides) {
    for (const std::int32_t process : {0, 1, 2}) {
      const BoardAddress address = boards[static_cast<std::size_t>(process)];
      EP_CHECK_EQ(side->host().Open(process, address).value_or(""), "");
    }
  }
  const auto start = Clock::now();
  OnThreads(2, [&](std::int64_t thread) {
    if (thread == 1) {
      CheckFailed(sides[1]->Make({}, process_of, 2), {"for rank 1 to come"});
    } else {
      CheckFailed(sides[0]->Make({}, process_of),
                  {"in epoch 1 process 0 was connecting and process 1 (pid " +
                   Show(getpid()) + ") has given up"});
    }
  });
  EP_CHECK(Clock::now() - start < 3 * kSoon);
}

// It shows words without a window, which tell those that wait for others first.
EP_TEST(ProcessWithoutAWindowEndsTheWaitForAThird) {
  const std::vector<std::int32_t> process_of = {0, 1, 2};
  std::vector<std::unique_ptr<Side>> sides;
  std::vector<BoardAddress> boards;
  for (const std::int32_t here : {0, 1, 2}) {
    sides.push_back(std::make_unique<Side>(here, kLong));
    boards.push_back(sides.back()->address());
  }
  for (const auto& side : sides) {
    for (const std::int32_t process : {0, 1, 2}) {
      const BoardAddress address = boards[static_cast<std::size_t>(process)];
      EP_CHECK(!side->host().Open(process, address));
    }
  }
  {
    const FileLimit limit(0);
    CheckFailed(sides[1]->Make({}, process_of), {"memfd_create: Too many open files"});
  }
  const auto start = Clock::now();
  CheckFailed(sides[2]->Make({}, process_of),
              {"and process 1 (pid " + Show(getpid()) + ") has given up"});
  EP_CHECK(Clock::now() - start < kSoon);
}

EP_TEST(ProcessThatCannotBeWatchedIsReported) {
  const std::unique_ptr<Host> host = NewHost();
  const int next = dup(STDOUT_FILENO);
  close(next);
  // The board can still be opened.
  const FileLimit limit(static_cast<rlim_t>(next) + 1);
  EP_CHECK_EQ(host->Open(1, host->address()).value_or(""),
              "process 1 (pid " + Show(getpid()) +
                  ") cannot be watched: pidfd_open: Too many open files");
}

EP_TEST(BoardThatCannotBeMadeOrOpenedIsReported) {
  const std::unique_ptr<Host> host = NewHost();
  const FileLimit limit(0);
  const auto made = Host::Create(0, [] { return kLong; });
  const std::string opened = host->Open(1, host->address()).value_or("");
  const auto* problem = std::get_if<std::string>(&made);
  EP_CHECK_EQ(problem == nullptr ? "" : *problem, "memfd_create: Too many open files");
  EP_CHECK_EQ(opened, "the board of process 1 (pid " + Show(getpid()) +
                          ") cannot be opened: open /proc/" + Show(getpid()) + "/fd/" +
                          Show(host->address().number) + ": Too many open files");
}

EP_TEST(BoardThatIsNotThereIsReported) {
  const std::unique_ptr<Host> host = NewHost();
  const BoardAddress nowhere = {.process = getpid(), .number = 1'000'000};
  const std::string problem = host->Open(1, nowhere).value_or("no problem");
  EP_CHECK(problem.find("open /proc/") != std::string::npos);
}

}  // namespace
}  // namespace jax_ep
