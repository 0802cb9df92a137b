// Tests exchanges among GPUs of one process, on emulated streams that idle at random:
// what is not ordered by events goes wrong, and ThreadSanitizer sees it.
#include "fabric/gpus/stream_exchange.h"

#include <cuda_runtime.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "captured_reports.h"
#include "check.h"
#include "emulated_streams.h"
#include "fabric/gpus/stream_points.h"
#include "fabric/threads/meeting.h"
#include "threads.h"

namespace jax_ep {
namespace {

using std::chrono::microseconds;

constexpr std::int64_t kRanks = 4;
constexpr std::size_t kNumbers = 64;

// One GPU: a stream, and a buffer that it fills, lends, and clears behind the exchange.
struct Gpu {
  std::vector<std::uint64_t> lent = std::vector<std::uint64_t>(kNumbers);
  std::vector<std::uint64_t> sums = std::vector<std::uint64_t>(kNumbers);
  const OwnStream own;  // last, as what is on it uses all above
  const cudaStream_t stream = own.get();
};

void PutFilling(Gpu& gpu, std::uint64_t number) {
  emulation::Enqueue(gpu.stream, [&gpu, number] {
    for (std::uint64_t& value : gpu.lent) value = number;
    return cudaSuccess;
  });
}

StreamCall MakeCall(Gpu& gpu, std::int32_t rank, std::int64_t turn) {
  StreamCall call = {};
  call.attendance.key = {.run_id = turn, .call_site = 1, .group = 0};
  call.attendance.print = {.op = "dispatch", .rows = 64, .row_bytes = 8};
  call.attendance.rank = rank;
  call.attendance.num_ranks = kRanks;
  call.attendance.lent = {{.data = gpu.lent.data(), .shared_bytes = 8 * kNumbers}};
  call.stream = gpu.stream;
  call.launch = [&gpu](const PeerTables& tables) {
    // As a kernel has them: they are gone when it runs.
    const std::vector<const void*> peers(tables[0], tables[0] + kRanks);
    return emulation::Enqueue(gpu.stream, [&gpu, peers] {
      for (std::size_t i = 0; i < kNumbers; ++i) {
        gpu.sums[i] = 0;
        for (const void* lent : peers) {
          gpu.sums[i] += static_cast<const std::uint64_t*>(lent)[i];
        }
      }
      return cudaSuccess;
    });
  };
  return call;
}

std::uint64_t NumberOf(std::int64_t rank, std::int64_t turn) {
  return static_cast<std::uint64_t>(turn * 1000 + rank);
}

std::uint64_t SumIn(std::int64_t turn) {
  std::uint64_t sum = 0;
  for (std::int64_t rank = 0; rank < kRanks; ++rank) sum += NumberOf(rank, turn);
  return sum;
}

void CheckSums(const Gpu& gpu, std::int64_t turn) {
  EP_CHECK_EQ(cudaStreamSynchronize(gpu.stream), cudaSuccess);
  for (const std::uint64_t sum : gpu.sums) {
    if (!EP_CHECK_EQ(sum, SumIn(turn))) return;
  }
}

// What a rank's stream does in one turn: nothing waits for the host in between.
void TakeTurn(MeetingPoint& point, Gpu& gpu, std::int64_t rank, std::int64_t turn) {
  PutFilling(gpu, NumberOf(rank, turn));
  const auto failure =
      ExchangeOnStreams(point, MakeCall(gpu, static_cast<std::int32_t>(rank), turn));
  EP_CHECK(!failure);
  PutFilling(gpu, ~std::uint64_t{0});
}

EP_TEST(StreamsReadWhatIsReadyAndNoLater) {
  const Latency latency(microseconds(100));
  MeetingPoint point;
  std::vector<Gpu> gpus(kRanks);
  OnThreads(kRanks, [&](std::int64_t rank) {
    Gpu& gpu = gpus[static_cast<std::size_t>(rank)];
    for (std::int64_t turn = 0; turn < 60; ++turn) {
      TakeTurn(point, gpu, rank, turn);
      if (turn % 4 == 0) CheckSums(gpu, turn);
    }
    CheckSums(gpu, 59);
  });
}

// Two calls of a program that launch in different orders on different GPUs.
EP_TEST(CallsMeetTheirOwnKind) {
  const Latency latency(microseconds(100));
  MeetingPoint point;
  std::vector<Gpu> some(kRanks);
  std::vector<Gpu> others(kRanks);
  OnThreads(2 * kRanks, [&](std::int64_t thread) {
    const std::int64_t rank = thread % kRanks;
    const auto index = static_cast<std::size_t>(rank);
    Gpu& gpu = (thread < kRanks ? some : others)[index];
    for (std::int64_t turn = 0; turn < 30; ++turn) {
      PutFilling(gpu, NumberOf(rank, turn));
      StreamCall call = MakeCall(gpu, static_cast<std::int32_t>(rank), turn);
      call.attendance.key.call_site = thread < kRanks ? 1 : 2;
      EP_CHECK(!ExchangeOnStreams(point, call));
      CheckSums(gpu, turn);
    }
  });
}

bool Says(const std::optional<StreamFailure>& failure, const std::string& what) {
  return failure && failure->what.find(what) != std::string::npos;
}

EP_TEST(ARankThatDoesNotComeIsNamed) {
  const CapturedReports reports;
  MeetingPoint point;
  point.SetTimeout(std::chrono::milliseconds(100));
  std::vector<Gpu> gpus(kRanks);
  OnThreads(kRanks - 1, [&](std::int64_t rank) {
    Gpu& gpu = gpus[static_cast<std::size_t>(rank)];
    const auto failure =
        ExchangeOnStreams(point, MakeCall(gpu, static_cast<std::int32_t>(rank), 0));
    EP_CHECK(Says(failure, "for rank 3 to come"));
    EP_CHECK(failure && !failure->is_of_cuda);
    // Nothing waits on the stream.
    EP_CHECK_EQ(cudaStreamSynchronize(gpu.stream), cudaSuccess);
  });
  point.SetTimeout(kDefaultWait);
  OnThreads(kRanks, [&](std::int64_t rank) {
    Gpu& gpu = gpus[static_cast<std::size_t>(rank)];
    TakeTurn(point, gpu, rank, 1);
    CheckSums(gpu, 1);
  });
}

EP_TEST(AnotherCallIsNamed) {
  const CapturedReports reports;
  MeetingPoint point;
  std::vector<Gpu> gpus(kRanks);
  OnThreads(kRanks, [&](std::int64_t rank) {
    StreamCall call = MakeCall(gpus[static_cast<std::size_t>(rank)],
                               static_cast<std::int32_t>(rank), 0);
    if (rank == 2) call.attendance.print.op = "combine";
    EP_CHECK(Says(ExchangeOnStreams(point, call), "combine of [64 rows, 8 bytes]"));
  });
}

EP_TEST(ARankThatCannotLaunchIsNamed) {
  MeetingPoint point;
  std::vector<Gpu> gpus(kRanks);
  OnThreads(kRanks, [&](std::int64_t rank) {
    StreamCall call = MakeCall(gpus[static_cast<std::size_t>(rank)],
                               static_cast<std::int32_t>(rank), 0);
    if (rank == 1) {
      call.launch = [](const PeerTables&) { return cudaErrorInvalidConfiguration; };
    }
    const auto failure = ExchangeOnStreams(point, call);
    EP_CHECK(Says(failure, rank == 1 ? "invalid configuration"
                                     : "without rank 1, which could not"));
    EP_CHECK(failure && failure->is_of_cuda);
    EP_CHECK_EQ(cudaStreamSynchronize(call.stream), cudaSuccess);
  });
}

EP_TEST(ARankThatIsLateToLaunchIsNamed) {
  MeetingPoint point;
  point.SetTimeout(std::chrono::milliseconds(50));
  std::vector<Gpu> gpus(kRanks);
  OnThreads(kRanks, [&](std::int64_t rank) {
    StreamCall call = MakeCall(gpus[static_cast<std::size_t>(rank)],
                               static_cast<std::int32_t>(rank), 0);
    if (rank == 1) {
      call.launch = [launch = call.launch](const PeerTables& tables) {
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        return launch(tables);
      };
    }
    const auto failure = ExchangeOnStreams(point, call);
    if (rank != 1) EP_CHECK(Says(failure, "for rank 1 to launch its kernels"));
  });
  // What ranks have put on their streams still reads what others lend.
  for (const Gpu& gpu : gpus)
    EP_CHECK_EQ(cudaStreamSynchronize(gpu.stream), cudaSuccess);
}

// Of exchanges that went well, and of those whose ranks did not all come.
EP_TEST(EventsAreUsedAgain) {
  const CapturedReports reports;
  MeetingPoint point;
  point.SetTimeout(std::chrono::milliseconds(20));
  Gpu gpu;
  cudaError_t error = cudaSuccess;
  StreamPoints* first = TakeStreamPoints(1, error);
  ReleaseStreamPoints(first);
  for (std::int64_t turn = 0; turn < 3; ++turn) {
    EP_CHECK(ExchangeOnStreams(point, MakeCall(gpu, 0, turn)).has_value());
    StreamPoints* again = TakeStreamPoints(1, error);
    EP_CHECK(again == first);
    ReleaseStreamPoints(again);
  }
}

}  // namespace
}  // namespace jax_ep
