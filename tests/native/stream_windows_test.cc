// Tests exchanges among GPUs of two processes, on emulated streams that idle at random
// and memory that both have open.
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "captured_reports.h"
#include "check.h"
#include "emulated_streams.h"
#include "fabric/gpus/device_window.h"
#include "fabric/gpus/shared_memory.h"
#include "fabric/gpus/stream_exchange.h"
#include "forked_processes.h"
#include "threads.h"

namespace jax_ep {
namespace {

using std::chrono::microseconds;

// One rank: its stream, its window, and two buffers that it fills, lends, and clears
// behind the exchange.
struct Gpu {
  DeviceWindow window;
  std::vector<std::vector<std::uint64_t>> lent;
  std::vector<std::uint64_t> sums;
  const OwnStream own;  // last, as what is on it uses all above
  const cudaStream_t stream = own.get();
};

// More in some turns, so that windows get other memory.
std::size_t NumbersIn(std::int64_t turn) {
  return turn % 7 == 6 ? 3000 : 10 + static_cast<std::size_t>(turn % 5);
}

std::uint64_t NumberOf(std::int64_t rank, std::int64_t turn, std::size_t lent) {
  return static_cast<std::uint64_t>(turn * 1000 + rank * 10) + lent;
}

void PutFilling(Gpu& gpu, std::int64_t rank, std::int64_t turn) {
  emulation::Enqueue(gpu.stream, [&gpu, rank, turn] {
    for (std::size_t lent = 0; lent < 2; ++lent) {
      for (auto& value : gpu.lent[lent]) value = NumberOf(rank, turn, lent);
    }
    return cudaSuccess;
  });
}

// In some turns the first buffer is made in the window, by all ranks.
bool IsMadeThere(std::int64_t turn) { return turn % 3 == 1; }

void MakeThere(Gpu& gpu, std::int64_t rank, std::int64_t turn, StreamCall& call) {
  call.attendance.lent[0].data = nullptr;
  call.prepare = [&gpu, rank, turn](const std::vector<void*>& places) {
    auto* numbers = static_cast<std::uint64_t*>(places[0]);
    return emulation::Enqueue(gpu.stream, [numbers, rank, turn] {
      std::fill_n(numbers, NumbersIn(turn), NumberOf(rank, turn, 0));
      return cudaSuccess;
    });
  };
}

StreamCall MakeCall(Gpu& gpu, std::int64_t rank, std::int64_t turn,
                    std::shared_ptr<const Span> span) {
  const std::size_t count = NumbersIn(turn);
  const std::size_t num_ranks = span->process_of.size();
  StreamCall call = {};
  call.attendance.key = {.run_id = turn, .call_site = 1, .group = 0};
  call.attendance.print = {
      .op = "dispatch", .rows = static_cast<std::int64_t>(count), .row_bytes = 16};
  call.attendance.rank = static_cast<std::int32_t>(rank);
  call.attendance.num_ranks = static_cast<std::int32_t>(num_ranks);
  for (const auto& lent : gpu.lent) {
    call.attendance.lent.push_back(
        {.data = lent.data(), .shared_bytes = static_cast<std::int64_t>(8 * count)});
  }
  call.attendance.span = std::move(span);
  call.stream = gpu.stream;
  call.window = &gpu.window;
  if (IsMadeThere(turn)) MakeThere(gpu, rank, turn, call);
  call.launch = [&gpu, count, num_ranks](const PeerTables& tables) {
    std::vector<const void*> peers(tables[0], tables[0] + num_ranks);
    peers.insert(peers.end(), tables[1], tables[1] + num_ranks);
    return emulation::Enqueue(gpu.stream, [&gpu, peers, count] {
      gpu.sums.assign(count, 0);
      for (const void* lent : peers) {
        for (std::size_t i = 0; i < count; ++i) {
          gpu.sums[i] += static_cast<const std::uint64_t*>(lent)[i];
        }
      }
      return cudaSuccess;
    });
  };
  return call;
}

// A stream that failed, as it waited for a process that has ended, has none: the next
// call, or the end of all turns, tells.
bool HasSums(const Gpu& gpu, std::int64_t num_ranks, std::int64_t turn) {
  if (cudaStreamSynchronize(gpu.stream) != cudaSuccess) return true;
  std::uint64_t want = 0;
  for (std::int64_t rank = 0; rank < num_ranks; ++rank) {
    want += NumberOf(rank, turn, 0) + NumberOf(rank, turn, 1);
  }
  return gpu.sums == std::vector<std::uint64_t>(NumbersIn(turn), want);
}

using Failures = std::vector<std::optional<StreamFailure>>;  // by rank

// Has all ranks of a process take their turns; returns what went wrong, or that sums
// did, for each.
Failures TakeTurns(Side& side, const std::vector<std::int32_t>& process_of,
                   std::int32_t here, std::int64_t turns) {
  Failures failures(process_of.size());
  const auto num_ranks = static_cast<std::int64_t>(process_of.size());
  OnThreads(num_ranks, [&](std::int64_t rank) {
    const auto index = static_cast<std::size_t>(rank);
    if (process_of[index] != here) return;
    Gpu gpu;
    gpu.lent.assign(2, std::vector<std::uint64_t>(NumbersIn(6)));
    for (std::int64_t turn = 0; turn < turns && !failures[index]; ++turn) {
      PutFilling(gpu, rank, turn);
      failures[index] = ExchangeOnStreams(
          side.point(), MakeCall(gpu, rank, turn, side.SpanOf(process_of, 0)));
      PutFilling(gpu, -1, -1);
      const bool looks = turn % 4 == 0 || turn + 1 == turns;
      if (!failures[index] && looks && !HasSums(gpu, num_ranks, turn)) {
        failures[index] = {.what = "wrong sums", .is_of_cuda = false};
      }
    }
    if (cudaStreamSynchronize(gpu.stream) != cudaSuccess && !failures[index]) {
      failures[index] = {.what = "the stream failed", .is_of_cuda = true};
    }
  });
  return failures;
}

bool AllWell(const Failures& failures) {
  for (const auto& failure : failures) {
    if (failure && EP_CHECK_EQ(failure->what, "")) return false;
    if (failure) return false;
  }
  return true;
}

bool Names(const std::optional<StreamFailure>& failure, const std::string& who) {
  if (failure && failure->what.find(who) != std::string::npos) return true;
  EP_CHECK_EQ(failure ? failure->what : "no failure", "one that names " + who);
  return false;
}

EP_TEST(ProcessesReadEachOthersWindows) {
  constexpr std::int64_t kTurns = 60;
  for (const std::vector<std::int32_t>& process_of : {kOneEach, {0, 1, 0, 1}}) {
    const Case which("ranks in processes " + Show(process_of));
    const auto take_turns = [&](Side& side, std::int32_t here) {
      const Latency latency(microseconds(100));
      return AllWell(TakeTurns(side, process_of, here, kTurns));
    };
    Child child(1, kLong, [&](Side& side) { return take_turns(side, 1); }, true);
    Side own(0, kLong, true);
    child.Join(own, 0);
    EP_CHECK(take_turns(own, 0));
    EP_CHECK(child.Ended());
  }
}

// In any phase, of the first epoch too, in which others open what it has.
EP_TEST(AKilledProcessIsNamedAtOnce) {
  for (const auto& [phase, last] :
       {std::pair(Phase::kPublishing, Epoch{4}), std::pair(Phase::kAwaiting, Epoch{4}),
        std::pair(Phase::kPulling, Epoch{4}), std::pair(Phase::kPulling, Epoch{1})}) {
    const Case which("phase " + Show(static_cast<int>(phase)) + " epoch " + Show(last));
    const CapturedReports reports;
    Child child(
        1, kLong,
        [&](Side& side) {
          side.host().set_on_phase([=](Phase entered, Epoch epoch) {
            if (entered == phase && epoch == last) kill(getpid(), SIGKILL);
          });
          TakeTurns(side, kOneEach, 1, 10);
          return false;
        },
        true);
    Side own(0, kLong, true);
    child.Join(own, 0);
    const auto began = std::chrono::steady_clock::now();
    const Failures failures = TakeTurns(own, kOneEach, 0, 10);
    EP_CHECK(Names(failures[0], "process 1"));
    EP_CHECK(std::chrono::steady_clock::now() - began < kLong / 2);
  }
}

// It stops rather than ends: the memory of one that has ended can no longer be opened
// by those who were slower than it in its last turn.
EP_TEST(AProcessThatIsLateIsNamed) {
  const CapturedReports reports;
  Child child(
      1, kLong,
      [](Side& side) {
        if (AllWell(TakeTurns(side, kOneEach, 1, 2))) raise(SIGSTOP);
        return false;
      },
      true);
  Side own(0, kSoon, true);
  child.Join(own, 0);
  EP_CHECK(AllWell(TakeTurns(own, kOneEach, 0, 2)));
  EP_CHECK(Names(TakeTurns(own, kOneEach, 0, 1)[0], "process 1"));
}

EP_TEST(MemoryIsTriedBeforeItIsReliedOn) {
  std::vector<char> handle(sizeof(cudaIpcMemHandle_t));
  EP_CHECK_EQ(OfferMemory(0, handle.data()), cudaSuccess);
  const pid_t child = fork();
  if (child == 0) _exit(TryMemory(1, handle.data()) == cudaSuccess ? 0 : 1);
  int status = -1;
  EP_CHECK_EQ(waitpid(child, &status, 0), child);
  EP_CHECK_EQ(status, 0);
  EP_CHECK(TryMemory(1, std::vector<char>(handle.size()).data()) != cudaSuccess);
}

}  // namespace
}  // namespace jax_ep
