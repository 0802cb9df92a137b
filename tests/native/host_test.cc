#include "fabric/processes/host.h"

#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "check.h"
#include "fabric/processes/process_words.h"
#include "fabric/threads/meeting.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

using std::chrono::duration;

// The end of a process is noticed long before this has passed, and an answer comes.
constexpr duration<double> kLong{60};
constexpr duration<double> kSoon{1};

std::unique_ptr<Host> NewHost(std::int32_t here = 0, duration<double> timeout = kLong) {
  auto host = Host::Create(here, [timeout] { return timeout; });
  if (auto* problem = std::get_if<std::string>(&host)) {
    EP_CHECK_EQ(*problem, "");
    return nullptr;
  }
  return std::move(std::get<std::unique_ptr<Host>>(host));
}

// One process's side: its host and where its ranks meet.
class Side {
 public:
  Side(std::int32_t here, duration<double> timeout)
      : here_(here), host_(NewHost(here, timeout)) {
    point_.SetTimeout(timeout);
  }

  Host& host() { return *host_; }
  BoardAddress address() const { return host_->address(); }

  std::shared_ptr<const Span> SpanOf(const std::vector<std::int32_t>& process_of,
                                     std::int32_t group) {
    // The host owns the channel.
    Relay* relay = host_->ChannelOf(process_of, group).get();
    return std::make_shared<Span>(
        Span{.process_of = process_of,
             .here = here_,
             .site = 1,
             .first_run = 0,
             .relay = std::shared_ptr<Relay>(std::shared_ptr<void>(), relay)});
  }

  // Makes the call of all of this process's ranks from `first` on; returns what came of
  // the first one's.
  SpanOutcome Make(SpanCall call, const std::vector<std::int32_t>& process_of,
                   std::size_t first = 0) {
    const auto span = SpanOf(process_of, call.group);
    std::vector<PendingSpanCall> pending;
    for (std::size_t rank = first; rank < process_of.size(); ++rank) {
      if (process_of[rank] != here_) continue;
      call.rank = static_cast<std::int32_t>(rank);
      pending.emplace_back(point_, span, call, helpers_.schedule());
    }
    for (const PendingSpanCall& rank : pending) rank.Wait();
    return pending.front().Wait();
  }

  // As Make, turn after turn, until one fails; returns that one, or the last.
  SpanOutcome MakeTurns(const std::vector<std::int32_t>& process_of,
                        std::int64_t turns) {
    SpanCall call;
    SpanOutcome outcome;
    for (call.turn = 0; call.turn < turns; ++call.turn) {
      // Windows grow past what is mapped at once.
      call.bytes = {call.turn == 6 ? 2'100'000 : call.turn * 301, 77};
      outcome = Make(call, process_of);
      if (outcome.failure || !CheckWorked(call, process_of.size(), outcome)) break;
    }
    return outcome;
  }

 private:
  const std::int32_t here_;
  HelperThreads helpers_{2};
  std::unique_ptr<Host> host_;
  MeetingPoint point_;
};

// A process of its own that runs `body(side, its end of a pair of pipes)`.
class Child {
 public:
  // To be made while this process has no other threads.
  Child(std::int32_t here, duration<double> timeout,
        const std::function<bool(Side&)>& body) {
    std::array<int, 2> to_child{};
    std::array<int, 2> from_child{};
    EP_CHECK_EQ(pipe(to_child.data()), 0);
    EP_CHECK_EQ(pipe(from_child.data()), 0);
    process_ = fork();
    if (process_ == 0) {
      _exit(Run(here, timeout, body, to_child[0], from_child[1]) ? 0 : 1);
    }
    close(to_child[0]);
    close(from_child[1]);
    to_ = to_child[1];
    from_ = from_child[0];
  }
  ~Child() {
    if (process_ > 0) {
      kill(process_, SIGKILL);
      waitpid(process_, nullptr, 0);
    }
    close(to_);
    close(from_);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  // Tells this process's host and the child's of each other, each first told by its own
  // process.
  void Join(Side& own, std::int32_t here) {
    const BoardAddress mine = own.address();
    BoardAddress theirs{};
    EP_CHECK_EQ(read(from_, &theirs, sizeof(theirs)),
                static_cast<ssize_t>(sizeof(theirs)));
    EP_CHECK_EQ(theirs.process, process_);
    EP_CHECK_EQ(write(to_, &mine, sizeof(mine)), static_cast<ssize_t>(sizeof(mine)));
    EP_CHECK_EQ(own.host().Open(1 - here, theirs).value_or(""), "");
    EP_CHECK_EQ(own.host().Open(here, mine).value_or(""), "");
  }

  pid_t process() const { return process_; }
  void Signal(int signal) const { kill(process_, signal); }
  // Waits for its end; returns whether its body said that all was well.
  bool Ended() {
    int status = -1;
    waitpid(process_, &status, 0);
    process_ = -1;
    return status == 0;
  }

 private:
  static bool Run(std::int32_t here, duration<double> timeout,
                  const std::function<bool(Side&)>& body, int from, int to) {
    Side side(here, timeout);
    const BoardAddress mine = side.address();
    BoardAddress theirs{};
    if (write(to, &mine, sizeof(mine)) < 0) return false;
    if (read(from, &theirs, sizeof(theirs)) != sizeof(theirs)) return false;
    return !side.host().Open(1 - here, theirs) && body(side);
  }

  pid_t process_ = -1;
  int to_ = -1;
  int from_ = -1;
};

const std::vector<std::int32_t> kOneEach = {0, 1};

EP_TEST(ProcessesExchange) {
  constexpr std::int64_t kTurns = 60;
  for (const std::vector<std::int32_t>& process_of :
       {kOneEach, {0, 0, 1, 1}, {1, 0, 0, 0}}) {
    const Case which("ranks in processes " + Show(process_of));
    Child child(1, kLong, [&](Side& side) {
      return !side.MakeTurns(process_of, kTurns).failure;
    });
    Side own(0, kLong);
    child.Join(own, 0);
    EP_CHECK_EQ(own.host().here(), 0);
    EP_CHECK(own.host().IsAlive(1));
    EP_CHECK_EQ(own.MakeTurns(process_of, kTurns).failure.value_or(""), "");
    EP_CHECK(child.Ended());
  }
}

// Groups of the same processes, and those that count the ranks another way round; each
// process comes to them in its own order.
EP_TEST(GroupsHaveChannelsOfTheirOwn) {
  const auto make_all = [](Side& side, bool forwards) {
    std::vector<std::pair<std::vector<std::int32_t>, std::int32_t>> groups = {
        {kOneEach, 0}, {kOneEach, 1}, {{1, 0}, 0}, {{0, 1, 1}, 1}};
    if (!forwards) groups = {groups.rbegin(), groups.rend()};
    std::vector<int> worked(groups.size());
    OnThreads(static_cast<std::int64_t>(groups.size()), [&](std::int64_t thread) {
      const auto i = static_cast<std::size_t>(thread);
      const auto& [process_of, group] = groups[i];
      SpanCall call = {.run_id = static_cast<std::int64_t>(process_of.size()) +
                                 10 * std::int64_t{process_of[0]},
                       .group = group};
      for (call.turn = 0; call.turn < 20; ++call.turn) {
        if (!CheckWorked(call, process_of.size(), side.Make(call, process_of))) return;
      }
      worked[i] = 1;
    });
    return worked == std::vector<int>(groups.size(), 1);
  };
  Child child(1, kLong, [&](Side& side) { return make_all(side, false); });
  Side own(0, kLong);
  child.Join(own, 0);
  EP_CHECK(own.host().ChannelOf(kOneEach, 0) == own.host().ChannelOf(kOneEach, 0));
  EP_CHECK(own.host().ChannelOf(kOneEach, 0) != own.host().ChannelOf(kOneEach, 1));
  EP_CHECK(make_all(own, true));
  EP_CHECK(child.Ended());
}

// A process that gets SIGKILL as it enters a phase of its fourth exchange.
EP_TEST(KilledProcessIsNamedAtOnce) {
  for (const Phase phase : {Phase::kFollowing, Phase::kMeeting, Phase::kReusing,
                            Phase::kPublishing, Phase::kAwaiting, Phase::kPulling}) {
    const Case which("phase " + Show(static_cast<int>(phase)));
    Child child(1, kLong, [&](Side& side) {
      side.host().set_on_phase([phase](Phase entered, Epoch epoch) {
        if (entered == phase && epoch == 4) kill(getpid(), SIGKILL);
      });
      return side.MakeTurns(kOneEach, 100).failure.has_value();
    });
    Side own(0, kLong);
    child.Join(own, 0);
    const auto start = Clock::now();
    const SpanOutcome outcome = own.MakeTurns(kOneEach, 100);
    CheckFailed(outcome, {"dispatch: rank 0 of 2 gave up, because in epoch ",
                          "rank 1 of process 1 had ended, ", ", in epoch 4"});
    EP_CHECK(Clock::now() - start < 3 * kSoon);
    EP_CHECK(!child.Ended());
    // From now on at once, and other groups that need it fail, too.
    const auto next = Clock::now();
    CheckFailed(own.Make({.run_id = 2}, kOneEach), {"rank 1 of process 1 had ended"});
    CheckFailed(
        own.Make({.group = 1}, kOneEach),
        {"in epoch 1 process 0 was connecting and process 1 (pid ", "has ended"});
    EP_CHECK(Clock::now() - next < kSoon);
  }
}

// A process that dies while the other already waits for it.
EP_TEST(WaitEndsSoonAfterAKill) {
  Child child(1, kLong, [](Side& side) {
    side.MakeTurns(kOneEach, 3);
    for (;;) pause();
    return false;
  });
  Side own(0, kLong);
  child.Join(own, 0);
  EP_CHECK_EQ(own.MakeTurns(kOneEach, 3).failure.value_or(""), "");
  Clock::time_point killed;
  std::thread killer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    killed = Clock::now();
    child.Signal(SIGKILL);
  });
  const SpanOutcome outcome = own.Make({.turn = 3}, kOneEach);
  const Clock::time_point told = Clock::now();
  killer.join();
  CheckFailed(outcome,
              {"in epoch 4 process 0 was waiting for the others to publish and "
               "rank 1 of process 1 had ended, between exchanges, in epoch 3"});
  EP_CHECK(told > killed);
  EP_CHECK(told - killed < kSoon);
}

EP_TEST(StoppedProcessIsNamedAtTheTimeout) {
  constexpr duration<double> kTimeout{0.5};
  Child child(1, kLong, [](Side& side) {
    side.host().set_on_phase([](Phase entered, Epoch epoch) {
      if (entered != Phase::kPulling || epoch != 3) return;
      kill(getpid(), SIGSTOP);
      // Until all threads have stopped.
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    });
    return side.MakeTurns(kOneEach, 100).failure.has_value();
  });
  Side own(0, kTimeout);
  child.Join(own, 0);
  const auto start = Clock::now();
  CheckFailed(own.MakeTurns(kOneEach, 100),
              {"rank 1 of process 1 had not",
               " after 0.5 s; that process was last seen ", ", in epoch 3"});
  EP_CHECK(Clock::now() - start >= kTimeout);
  EP_CHECK(Clock::now() - start < kTimeout + 3 * kSoon);
  // When it goes on it is told that it is too late.
  child.Signal(SIGCONT);
  EP_CHECK(child.Ended());
}

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

// Lets this process have no more than so many files open while it lives.
class FileLimit {
 public:
  explicit FileLimit(rlim_t most) {
    EP_CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before_), 0);
    const rlimit limit = {.rlim_cur = most, .rlim_max = before_.rlim_max};
    EP_CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  }
  ~FileLimit() { EP_CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before_), 0); }
  FileLimit(const FileLimit&) = delete;
  FileLimit& operator=(const FileLimit&) = delete;

 private:
  rlimit before_{};
};

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
