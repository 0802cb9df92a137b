// Channels that fail before their first exchange: who is told, and of what.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "captured_reports.h"
#include "check.h"
#include "fabric/processes/channel.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

using std::chrono::duration;

constexpr duration<double> kShort{0.2};
// A call that ends much sooner than this did not wait for it.
constexpr duration<double> kLong{60};
constexpr duration<double> kAtOnce{20};

// The channel of process 0, with two ranks, of which the test decides how it gets to
// process 1.
class LoneChannel {
 public:
  LoneChannel(Open open, Connect connect)
      : channel_(kProcessOf, 0,
                 {.open = std::move(open),
                  .connect = std::move(connect),
                  .schedule = helpers_.schedule(),
                  .timeout = [] { return kLong; },
                  .max_threads = 1}),
        span_(std::make_shared<Span>(Span{
            .process_of = kProcessOf,
            .here = 0,
            .site = 1,
            .first_run = 0,
            .relay = std::shared_ptr<Relay>(std::shared_ptr<void>(), &channel_)})) {}

  // Lets both ranks make a call.
  std::vector<PendingSpanCall> Attend(SpanCall call) {
    std::vector<PendingSpanCall> pending;
    for (call.rank = 0; call.rank < 2; ++call.rank) {
      pending.emplace_back(point_, span_, call, helpers_.schedule());
    }
    return pending;
  }

  // Every call fails, for one reason and with one report.
  void CheckFails(const std::string& why) {
    const CapturedReports reports;
    for (std::int64_t run = 0; run < 3; ++run) {
      const std::vector<PendingSpanCall> pending = Attend({.run_id = run});
      for (std::size_t rank = 0; rank < pending.size(); ++rank) {
        CheckFailed(pending[rank].Wait(),
                    {"dispatch: rank " + Show(rank) + " of 3 gave up, because " + why});
      }
    }
    EP_CHECK_EQ(Show(reports.texts()),
                "[dispatch: ranks 0, 1 of 3 gave up, because " + why + "]");
  }

  Channel& channel() { return channel_; }

 private:
  inline static const std::vector<std::int32_t> kProcessOf = {0, 0, 1};

  HelperThreads helpers_;
  Channel channel_;
  std::shared_ptr<const Span> span_;
  MeetingPoint point_;
};

EP_TEST(ProblemOfConnectingIsReported) {
  Shown shown;
  LoneChannel lone(
      [&] { return ShowcaseOf(shown); },
      [](auto, const auto&) { return std::string("process 1 (pid 77) has ended"); });
  lone.CheckFails(
      "in epoch 1 process 0 was connecting and process 1 (pid 77) has ended");
  EP_CHECK_EQ(shown.words.gave_up.load(), 1);
}

// It has told the others so, and cannot be asked twice.
EP_TEST(ProblemOfOpeningIsReported) {
  std::atomic<int> opened{0};
  LoneChannel lone(
      [&] {
        ++opened;
        return std::string("memfd_create: Too many open files");
      },
      [](auto, const auto&) { return std::string("was not to be asked"); });
  lone.CheckFails(
      "in epoch 1 process 0 was connecting and memfd_create: Too many open files");
  EP_CHECK_EQ(opened.load(), 1);
}

// What its words tell is there for others to see at once, however long they would wait.
EP_TEST(ConnectingEndsWhenOwnRanksGiveUp) {
  Shown shown;
  std::atomic<bool> connects{false};
  LoneChannel lone([&] { return ShowcaseOf(shown); },
                   [&](auto, const auto& interruption) {
                     connects = true;
                     connects.notify_all();
                     for (;;) {
                       if (const auto why = interruption()) return *why;
                       std::this_thread::sleep_for(std::chrono::milliseconds(1));
                     }
                   });
  const std::vector<PendingSpanCall> pending = lone.Attend({});
  connects.wait(false);
  EP_CHECK(!pending.front().HasEnded());
  lone.channel().Break("rank 0 waited for rank 1");
  for (const PendingSpanCall& rank : pending) {
    CheckFailed(rank.Wait(), {"of 3 gave up, because rank 0 waited for rank 1"});
  }
  EP_CHECK_EQ(shown.words.gave_up.load(), 1);
}

// It shows its words only to say so: or the others would wait for them in vain.
EP_TEST(ProcessThatNeverExchangedTellsThatItGaveUp) {
  for (const std::int32_t lame : {0, 1}) {
    const Case which("missing in process " + Show(lame));
    const CapturedReports reports;
    SimulatedJob job(2);
    job.AddGroup({0, 0, 1, 1});
    for (const std::int32_t process : {0, 1}) job.SetTimeout(process, kLong);
    job.SetTimeout(lame, kShort);
    const auto start = Clock::now();
    OnThreads(3, [&](std::int64_t thread) {
      const auto rank = static_cast<std::int32_t>((2 * lame + 1 + thread) % 4);
      const SpanOutcome outcome = job.Attend({.rank = rank}).Wait();
      if (rank == 2 * lame + 1) {
        CheckFailed(outcome, {"waited 0.2 s for rank " + Show(2 * lame) + " to come"});
      } else {
        CheckFailed(outcome,
                    {"of process " + Show(lame) + " had given up, in epoch 1"});
      }
    });
    EP_CHECK(Clock::now() - start < kAtOnce);
    EP_CHECK_EQ(job.shown(0, lame).words.gave_up.load(), 1);
    EP_CHECK_EQ(reports.texts().size(), 2);  // one of each process
  }
}

}  // namespace
}  // namespace jax_ep
