// What is recorded of streams in exchanges, on emulated ones: a stream may be late
// whose thread was not.
#include "fabric/gpus/stream_times.h"

#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "cuda/stamp.h"
#include "emulated_streams.h"
#include "fabric/gpus/gpu_clock.h"
#include "fabric/gpus/stream_exchange.h"
#include "fabric/gpus/stream_points.h"
#include "fabric/threads/meeting.h"
#include "fabric/threads/recorder.h"
#include "threads.h"

namespace jax_ep {
namespace {

constexpr std::int64_t kRanks = 3;
constexpr std::int64_t kLate = 30'000'000;  // in nanoseconds
constexpr std::size_t kMany = 64;

// Calls are recorded while it lives, if they are to be.
class Recorded {
 public:
  explicit Recorded(bool enabled = true) { SetRecordsCalls(enabled); }
  ~Recorded() { SetRecordsCalls(false); }
  Recorded(const Recorded&) = delete;
  Recorded& operator=(const Recorded&) = delete;

  std::vector<StreamTimes> Times() const {
    std::vector<StreamTimes> times(kMany);
    times.resize(ReadStreamTimes(from_, times));
    return times;
  }
  std::vector<CallRecord> Calls() const {
    std::vector<CallRecord> records(ProcessRecorder().count() - calls_from_);
    records.resize(ProcessRecorder().Read(calls_from_, records));
    return records;
  }

 private:
  const std::uint64_t from_ = NumStreamTimes();
  const std::uint64_t calls_from_ = ProcessRecorder().count();
};

StreamCall MakeCall(cudaStream_t stream, std::int64_t rank, std::int64_t turn = 0) {
  StreamCall call = {};
  call.attendance.key = {.run_id = turn, .call_site = 1, .group = 0};
  call.attendance.print = {.op = "dispatch", .rows = 1, .row_bytes = 8};
  call.attendance.rank = static_cast<std::int32_t>(rank);
  call.attendance.num_ranks = kRanks;
  call.stream = stream;
  call.launch = [](const PeerTables&) { return cudaSuccess; };
  call.stamp = cuda::Stamp;
  return call;
}

// Has rank 1's stream come late, all threads having launched all. Returns when it was
// let go on.
std::int64_t ExchangeWithOneLate(MeetingPoint& point,
                                 const std::vector<OwnStream>& streams) {
  std::atomic<bool> may_go{false};
  emulation::Enqueue(streams[1].get(), [&] {
    may_go.wait(false);
    return cudaSuccess;
  });
  OnThreads(kRanks, [&](std::int64_t rank) {
    const cudaStream_t stream = streams[static_cast<std::size_t>(rank)].get();
    EP_CHECK(!ExchangeOnStreams(point, MakeCall(stream, rank)));
  });
  std::this_thread::sleep_for(std::chrono::nanoseconds(kLate));
  const std::int64_t released = cuda::ClockNow();
  may_go = true;
  may_go.notify_all();
  for (const OwnStream& stream : streams) {
    EP_CHECK_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
  }
  return released;
}

EP_TEST(TimesTellWhichStreamCameLate) {
  const Recorded recorded;
  MeetingPoint point;
  const std::vector<OwnStream> streams(kRanks);
  const std::int64_t released = ExchangeWithOneLate(point, streams);
  std::vector<StreamTimes> times(kRanks);
  EP_CHECK_EQ(recorded.Times().size(), times.size());
  for (const StreamTimes& read : recorded.Times()) {
    times[static_cast<std::size_t>(read.rank)] = read;
  }
  const std::vector<CallRecord> calls = recorded.Calls();
  if (!EP_CHECK_EQ(calls.size(), 1)) return;
  for (std::size_t rank = 0; rank < times.size(); ++rank) {
    const StreamTimes& own = times[rank];
    EP_CHECK_EQ(own.exchange, calls[0].exchange);
    EP_CHECK(0 < own.came && own.came <= own.began);
    EP_CHECK(own.began <= own.ended && own.ended <= own.told);
    EP_CHECK(released <= own.began);
    EP_CHECK_EQ(released <= own.came, rank == 1);
  }
  // Its thread was not late: all had been launched.
  ClockReading clock = {};
  EP_CHECK_EQ(ReadClock(0, cuda::Stamp, clock), cudaSuccess);
  EP_CHECK(calls[0].told + kLate / 2 <= times[1].came - clock.gpu + clock.host);
}

EP_TEST(NothingIsTimedUntilSwitchedOn) {
  const Recorded recorded(false);
  MeetingPoint point;
  const std::vector<OwnStream> streams(kRanks);
  const std::uint64_t before = NumStreamTimes();
  for (const bool is_stamped : {false, true}) {
    OnThreads(kRanks, [&](std::int64_t rank) {
      StreamCall call = MakeCall(streams[static_cast<std::size_t>(rank)].get(), rank);
      // As if recording were switched off just now.
      if (!is_stamped) call.stamp = nullptr;
      EP_CHECK(!ExchangeOnStreams(point, call));
      EP_CHECK_EQ(cudaStreamSynchronize(call.stream), cudaSuccess);
    });
    if (!is_stamped) EP_CHECK_EQ(NumStreamTimes(), before);
  }
  EP_CHECK(recorded.Times().empty());
}

EP_TEST(FailedExchangeIsNotTimed) {
  const Recorded recorded;
  MeetingPoint point;
  const std::vector<OwnStream> streams(kRanks);
  OnThreads(kRanks, [&](std::int64_t rank) {
    StreamCall call = MakeCall(streams[static_cast<std::size_t>(rank)].get(), rank);
    if (rank == 1) {
      call.launch = [](const PeerTables&) { return cudaErrorInvalidConfiguration; };
    }
    EP_CHECK(ExchangeOnStreams(point, call).has_value());
    EP_CHECK_EQ(cudaStreamSynchronize(call.stream), cudaSuccess);
  });
  EP_CHECK(recorded.Times().empty());
}

cudaError_t CannotStamp(std::int64_t*, cudaStream_t) {
  return cudaErrorInvalidConfiguration;
}

EP_TEST(ExchangeGoesOnUntimedIfItCannotBeTimed) {
  const Recorded recorded;
  MeetingPoint point;
  const std::vector<OwnStream> streams(kRanks);
  OnThreads(kRanks, [&](std::int64_t rank) {
    StreamCall call = MakeCall(streams[static_cast<std::size_t>(rank)].get(), rank);
    if (rank == 1) call.stamp = CannotStamp;
    EP_CHECK(!ExchangeOnStreams(point, call));
    EP_CHECK_EQ(cudaStreamSynchronize(call.stream), cudaSuccess);
  });
  EP_CHECK_EQ(recorded.Times().size(), kRanks - 1);
}

void TimeAtOnce() {
  TimedStream stream(cuda::Stamp, nullptr);
  stream.Note(&StreamTimes::came);
  stream.Belong({.exchange = 1, .rank = 2, .device = 3});
  stream.Note(&StreamTimes::told);
}

EP_TEST(LatestTimesAreHeld) {
  const Recorded recorded;
  TimeAtOnce();
  const std::vector<StreamTimes> times = recorded.Times();
  if (!EP_CHECK_EQ(times.size(), 1)) return;
  EP_CHECK(times[0].exchange == 1 && times[0].rank == 2 && times[0].device == 3);
  for (std::size_t i = 1; i < kMaxStreamTimes; ++i) ClaimStreamTimes();
  EP_CHECK_EQ(recorded.Times().size(), 1);
  ClaimStreamTimes();
  EP_CHECK(recorded.Times().empty());
}

EP_TEST(DevicesOfExchangesAreKnown) {
  cudaError_t error = cudaSetDevice(5);
  ReleaseStreamPoints(TakeStreamPoints(1, error));
  EP_CHECK_EQ(DevicesWithPoints().back(), 5);
  EP_CHECK_EQ(cudaSetDevice(0), cudaSuccess);
}

}  // namespace
}  // namespace jax_ep
