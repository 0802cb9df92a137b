// Implements stream_exchange.h.

#include "fabric/gpus/stream_exchange.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/work.h"
#include "fabric/gpus/signal.h"
#include "fabric/gpus/stream_points.h"
#include "fabric/threads/describe.h"

namespace jax_ep {
namespace {

using Clock = std::chrono::steady_clock;
using Failure = std::optional<StreamFailure>;

// What the meeting tells a rank. It lives until the meeting has no more use for it.
struct Outcome {
  PeerTables lent_by_all;                        // where the meeting keeps them
  std::vector<std::vector<const void*>> tables;  // copies, once all have come
  std::size_t num_ranks;
  std::optional<std::string> failure;
  Signal told;
};

void CopyTables(const void* opaque, std::int64_t) {
  auto& outcome = *static_cast<Outcome*>(const_cast<void*>(opaque));
  for (const void* const* table : outcome.lent_by_all) {
    outcome.tables.emplace_back(table, table + outcome.num_ranks);
  }
}

// Meets the peers, once what the rank lends, and its points last of it, are on their
// way.
std::shared_ptr<Outcome> MeetPeers(MeetingPoint& point, Attendance attendance,
                                   StreamPoints* points) {
  const auto outcome = std::make_shared<Outcome>();
  outcome->num_ranks = static_cast<std::size_t>(attendance.num_ranks);
  attendance.lent.push_back({.data = points, .shared_bytes = 0});
  attendance.make_work = [outcome](const PeerTables& tables) -> std::vector<Work> {
    outcome->lent_by_all = tables;
    return {{.args = outcome.get(), .run = CopyTables, .num_chunks = 1}};
  };
  attendance.done = [outcome](const std::optional<std::string>& failure) {
    outcome->failure = failure;
    outcome->told.Set(1);
  };
  attendance.schedule = nullptr;  // each rank goes on by itself, and takes little time
  point.Attend(attendance);
  // The meeting point tells everybody in time.
  while (outcome->told.Await(Clock::now() + std::chrono::hours(1)) == 0) {
  }
  return outcome;
}

Failure CudaFailure(cudaError_t error) {
  if (error == cudaSuccess) return std::nullopt;
  return StreamFailure{.what = std::string("CUDA says ") + cudaGetErrorString(error),
                       .is_of_cuda = true};
}

// The rank among its peers, who have all come.
class Streams {
 public:
  Streams(const StreamCall& call, const Outcome& outcome) : call_(call) {
    tables_.reserve(outcome.tables.size() - 1);
    for (const auto& table : outcome.tables) tables_.push_back(table.data());
    tables_.pop_back();
    for (const void* points : outcome.tables.back()) {
      points_.push_back(static_cast<StreamPoints*>(const_cast<void*>(points)));
    }
  }

  // Reads what peers lend once it is ready, and tells them when it has been read.
  Failure Read() {
    const cudaError_t error = PutReading();
    Own().recorded.Set(error == cudaSuccess ? StreamPoints::kYes
                                            : StreamPoints::kNever);
    return CudaFailure(error);
  }

  // Has the stream wait until all have read what this rank lends.
  Failure AwaitReaders(std::chrono::duration<double> timeout) {
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                             std::min(timeout, kLongestWait));
    for (std::size_t peer = 0; peer < points_.size(); ++peer) {
      if (IsOwn(peer)) continue;
      const std::uint32_t recorded = points_[peer]->recorded.Await(deadline);
      if (recorded != StreamPoints::kYes) return Unread(peer, recorded, timeout);
      const cudaError_t error =
          cudaStreamWaitEvent(call_.stream, points_[peer]->done, 0);
      if (error != cudaSuccess) return CudaFailure(error);
    }
    // If it failed, other ranks may still look at them.
    for (StreamPoints* points : points_) ReleaseStreamPoints(points);
    return std::nullopt;
  }

 private:
  cudaError_t PutReading() {
    for (std::size_t peer = 0; peer < points_.size(); ++peer) {
      if (IsOwn(peer)) continue;
      const cudaError_t error =
          cudaStreamWaitEvent(call_.stream, points_[peer]->ready, 0);
      if (error != cudaSuccess) return error;
    }
    const cudaError_t error = call_.launch(tables_);
    if (error != cudaSuccess) return error;
    return cudaEventRecord(Own().done, call_.stream);
  }

  Failure Unread(std::size_t peer, std::uint32_t recorded,
                 std::chrono::duration<double> timeout) const {
    const std::string who = RankList({static_cast<std::int32_t>(peer)});
    if (recorded == StreamPoints::kNever) {
      return StreamFailure{.what = who + " could not launch its kernels",
                           .is_of_cuda = true};
    }
    return StreamFailure{.what = "rank " + std::to_string(call_.attendance.rank) +
                                 " waited " + Seconds(timeout) + " for " + who +
                                 " to launch its kernels",
                         .is_of_cuda = false};
  }

  bool IsOwn(std::size_t rank) const {
    return static_cast<std::int32_t>(rank) == call_.attendance.rank;
  }
  StreamPoints& Own() {
    return *points_[static_cast<std::size_t>(call_.attendance.rank)];
  }

  const StreamCall& call_;
  PeerTables tables_;
  std::vector<StreamPoints*> points_;  // by rank
};

}  // namespace

std::optional<StreamFailure> ExchangeOnStreams(MeetingPoint& point,
                                               const StreamCall& call) {
  cudaError_t error = cudaSuccess;
  StreamPoints* own = TakeStreamPoints(call.attendance.num_ranks, error);
  if (own != nullptr) error = cudaEventRecord(own->ready, call.stream);
  if (error != cudaSuccess) return CudaFailure(error);
  const std::shared_ptr<Outcome> outcome = MeetPeers(point, call.attendance, own);
  if (outcome->failure) {
    own->num_users.store(1, std::memory_order_relaxed);  // nobody looked at them
    ReleaseStreamPoints(own);
    return StreamFailure{.what = *outcome->failure, .is_of_cuda = false};
  }
  Streams streams(call, *outcome);
  if (Failure failure = streams.Read()) return failure;
  return streams.AwaitReaders(point.timeout());
}

}  // namespace jax_ep
