// What is recorded of exchanges in one process and of those that span several.
#include "fabric/threads/recording.h"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "captured_reports.h"
#include "check.h"
#include "fabric/threads/meeting.h"
#include "fabric/threads/recorder.h"
#include "meeting_calls.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

constexpr std::int64_t kLate = 30'000'000;  // in nanoseconds

// Calls are recorded while it lives.
class Recorded {
 public:
  Recorded() : from_(ProcessRecorder().count()) { EP_CHECK(!SetRecordsCalls(true)); }
  ~Recorded() { SetRecordsCalls(false); }
  Recorded(const Recorded&) = delete;
  Recorded& operator=(const Recorded&) = delete;

  std::vector<CallRecord> All() const {
    std::vector<CallRecord> records(ProcessRecorder().count() - from_);
    records.resize(ProcessRecorder().Read(from_, records));
    return records;
  }

 private:
  const std::uint64_t from_;
};

Call CallOf(std::int32_t rank, std::int32_t num_ranks = 2) {
  return {.key = {.run_id = 12, .call_site = 4, .group = 0},
          .rank = rank,
          .num_ranks = num_ranks};
}

// All ranks in turn, the last one `late`.
void Exchange(MeetingPoint& point, std::int32_t num_ranks,
              std::chrono::nanoseconds late = {}) {
  std::vector<PendingCall> calls;
  for (std::int32_t rank = 0; rank < num_ranks; ++rank) {
    if (rank + 1 == num_ranks) std::this_thread::sleep_for(late);
    calls.emplace_back(point, CallOf(rank, num_ranks), AtOnce);
  }
  for (std::int32_t rank = 0; rank < num_ranks; ++rank) {
    CheckWorked(CallOf(rank, num_ranks), calls[static_cast<std::size_t>(rank)].Wait());
  }
}

EP_TEST(NothingIsRecordedUntilSwitchedOn) {
  const std::uint64_t before = ProcessRecorder().count();
  MeetingPoint point;
  Exchange(point, 2);
  EP_CHECK_EQ(ProcessRecorder().count(), before);
}

EP_TEST(RecordTellsWhoCameWhen) {
  const Recorded recorded;
  MeetingPoint point;
  const std::int64_t begin = SteadyNow();
  Exchange(point, 2, std::chrono::nanoseconds(kLate));
  const std::vector<CallRecord> records = recorded.All();
  if (!EP_CHECK_EQ(records.size(), 1)) return;
  const CallRecord& record = records[0];
  EP_CHECK_EQ(std::string(record.op), "dispatch");
  EP_CHECK_EQ(std::string(record.fabric), "devices");
  EP_CHECK_EQ(record.run, 12);
  EP_CHECK_EQ(record.call_site, 4);
  EP_CHECK_EQ(record.num_ranks, 2);
  EP_CHECK_EQ(record.is_here, 3);
  EP_CHECK_EQ(record.epoch, 0);
  EP_CHECK(begin <= record.came[0]);
  EP_CHECK(record.came[0] + kLate <= record.came[1]);
  EP_CHECK(record.came[1] <= record.began && record.began <= record.ended);
  EP_CHECK(record.ended <= record.told && record.told <= SteadyNow());
}

EP_TEST(ManyRanksTakeSeveralRecords) {
  const Recorded recorded;
  MeetingPoint point;
  Exchange(point, 70);
  const std::vector<CallRecord> records = recorded.All();
  if (!EP_CHECK_EQ(records.size(), 2)) return;
  EP_CHECK_EQ(records[1].exchange, records[0].exchange);
  EP_CHECK_EQ(records[0].first_rank, 0);
  EP_CHECK_EQ(records[0].is_here, ~std::uint64_t{0});
  EP_CHECK_EQ(records[1].first_rank, 64);
  EP_CHECK_EQ(records[1].is_here, 63);
  EP_CHECK(records[0].came[63] <= records[1].came[0]);
  EP_CHECK(records[1].came[5] <= records[1].began);
}

// A time that is not there would be taken for one.
EP_TEST(ExchangeThatSpansTheSwitchIsLeftOut) {
  MeetingPoint point;
  const PendingCall before(point, CallOf(0), AtOnce);
  {
    const Recorded recorded;
    CheckWorked(CallOf(1), PendingCall(point, CallOf(1), AtOnce).Wait());
    EP_CHECK(recorded.All().empty());
  }
  const std::uint64_t count = ProcessRecorder().count();
  SetRecordsCalls(true);
  const PendingCall first(point, CallOf(0), AtOnce);
  SetRecordsCalls(false);
  CheckWorked(CallOf(1), PendingCall(point, CallOf(1), AtOnce).Wait());
  CheckWorked(CallOf(0), first.Wait());
  EP_CHECK_EQ(ProcessRecorder().count(), count);
}

EP_TEST(FailedExchangeIsLeftOut) {
  const Recorded recorded;
  const CapturedReports reports;
  MeetingPoint point;
  Call other = CallOf(1);
  other.print.rows = 3;
  const PendingCall first(point, CallOf(0), AtOnce);
  CheckFailed(PendingCall(point, other, AtOnce).Wait(), {"rank 1"});
  CheckFailed(first.Wait(), {"rank 0"});
  EP_CHECK(recorded.All().empty());
}

// Each process has its own record, of what it saw. The second one is late after the
// first has come, whenever that is.
EP_TEST(ProcessesRecordOneExchangeUnderOneNumber) {
  const Recorded recorded;
  std::atomic<Epoch> last_come{0};
  SimulatedJob job(2, [&](std::int32_t process, Phase entered, Epoch epoch) {
    if (process == 0 && entered == Phase::kAwaiting) last_come = epoch;
  });
  job.AddGroup({0, 1});
  OnThreads(2, [&](std::int64_t rank) {
    SpanCall call = {.site = 3, .run_id = 9, .rank = static_cast<std::int32_t>(rank)};
    for (call.turn = 0; call.turn < 2; ++call.turn) {
      while (rank == 1 && last_come.load() <= static_cast<Epoch>(call.turn)) {
        std::this_thread::yield();
      }
      if (rank == 1) std::this_thread::sleep_for(std::chrono::nanoseconds(kLate));
      job.Works(call);
    }
  });
  const std::vector<CallRecord> records = recorded.All();
  EP_CHECK_EQ(records.size(), 4);
  for (std::int64_t epoch = 1; epoch <= 2; ++epoch) {
    std::vector<CallRecord> seen(2);  // by process
    for (const CallRecord& record : records) {
      if (record.epoch == epoch) seen[record.is_here - 1] = record;
    }
    if (!EP_CHECK(seen[0].is_here == 1 && seen[1].is_here == 2)) return;
    EP_CHECK(seen[0].came[0] + kLate <= seen[1].came[1]);
    // What process 0 sees of process 1 comes later than that has happened.
    EP_CHECK(seen[1].came[1] <= seen[1].published);
    EP_CHECK(seen[1].published <= seen[0].came[1]);
    EP_CHECK(seen[0].came[1] <= seen[0].began);
    EP_CHECK(seen[0].published <= seen[1].began);
    EP_CHECK(seen[0].ended <= seen[0].told);
  }
}

}  // namespace
}  // namespace jax_ep
