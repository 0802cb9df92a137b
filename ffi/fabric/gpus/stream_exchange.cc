// Implements stream_exchange.h.

#include "fabric/gpus/stream_exchange.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/work.h"
#include "fabric/gpus/cuda_says.h"
#include "fabric/gpus/device_window.h"
#include "fabric/gpus/signal.h"
#include "fabric/gpus/stream_points.h"
#include "fabric/gpus/stream_times.h"
#include "fabric/processes/window.h"
#include "fabric/threads/describe.h"

namespace jax_ep {
namespace {

using Clock = std::chrono::steady_clock;
using Failure = std::optional<StreamFailure>;

// What a rank tells the meeting and is told by it. It lives until the meeting has no
// more use for it.
struct Outcome {
  StreamPoints* points = nullptr;  // for ranks of this process
  WindowNote note = {};            // for those of others
  TimedStream times;
  std::int64_t exchange = kNotRecorded;  // as it is recorded

  std::size_t num_ranks = 0;
  PeerTables lent_by_all;                        // where the meeting keeps them
  std::vector<std::vector<const void*>> tables;  // copies, once all have come
  std::vector<WindowNote> notes;                 // by rank, if there are windows
  std::optional<std::string> failure;
  Signal told;
};

void CopyTables(const void* opaque, std::int64_t) {
  auto& outcome = *static_cast<Outcome*>(const_cast<void*>(opaque));
  for (const void* const* table : outcome.lent_by_all) {
    outcome.tables.emplace_back(table, table + outcome.num_ranks);
  }
}

// Others write their notes anew two exchanges later.
void CopyTablesAndNotes(const void* opaque, std::int64_t) {
  CopyTables(opaque, 0);
  auto& outcome = *static_cast<Outcome*>(const_cast<void*>(opaque));
  for (const void* note : outcome.tables.back()) {
    outcome.notes.push_back(*static_cast<const WindowNote*>(note));
  }
  outcome.tables.pop_back();
}

struct NoteCopy {
  const WindowNote* from;
  void* to;
};

// Has the note copied to where other processes read it; it is the last that is lent.
MakePublication PublicationOf(std::shared_ptr<Outcome> outcome) {
  const auto copy = std::make_shared<NoteCopy>();
  return [outcome = std::move(outcome), copy](const std::vector<void*>& places) {
    *copy = {.from = &outcome->note, .to = places.back()};
    const auto run = [](const void* opaque, std::int64_t) {
      const auto& note = *static_cast<const NoteCopy*>(opaque);
      std::memcpy(note.to, note.from, sizeof(WindowNote));
    };
    return std::vector<Work>{{.args = copy.get(), .run = run, .num_chunks = 1}};
  };
}

// Meets the peers, once what the rank lends is on its way: behind the kernels' buffers
// come its points and, where ranks are in other processes, its note.
void MeetPeers(MeetingPoint& point, Attendance attendance,
               const std::shared_ptr<Outcome>& outcome) {
  for (Lent& lent : attendance.lent) lent.shared_bytes = 0;
  attendance.lent.push_back({.data = outcome->points, .shared_bytes = 0});
  const bool spans = attendance.span != nullptr;
  if (spans) {
    attendance.lent.push_back(
        {.data = &outcome->note, .shared_bytes = sizeof(WindowNote)});
    attendance.make_publication = PublicationOf(outcome);
  }
  outcome->num_ranks = static_cast<std::size_t>(attendance.num_ranks);
  attendance.make_work = [outcome, spans](const PeerTables& tables) {
    outcome->lent_by_all = tables;
    return std::vector<Work>{{.args = outcome.get(),
                              .run = spans ? CopyTablesAndNotes : CopyTables,
                              .num_chunks = 1}};
  };
  attendance.done = [outcome](const std::optional<std::string>& failure) {
    outcome->failure = failure;
    outcome->told.Set(1);
  };
  attendance.exchange = &outcome->exchange;
  attendance.fabric = "launches";
  attendance.schedule = nullptr;  // each rank goes on by itself, and takes little time
  point.Attend(attendance);
  // Whoever carries the exchange tells everybody in time.
  while (outcome->told.Await(Clock::now() + std::chrono::hours(1)) == 0) {
  }
}

bool IsOfThisProcess(const StreamCall& call, std::size_t rank) {
  const auto& span = call.attendance.span;
  return span == nullptr || span->IsHere(static_cast<std::int64_t>(rank));
}

// "dispatch: rank 1"
std::string WhoOf(const StreamCall& call) {
  return call.attendance.print.op + std::string(": ") +
         RankList({call.attendance.rank});
}

Failure CudaFailure(const StreamCall& call, cudaError_t error) {
  if (error == cudaSuccess) return std::nullopt;
  return StreamFailure{.what = WhoOf(call) + ": " + CudaSays(error),
                       .is_of_cuda = true};
}

// The rank among its peers, who have all come.
class Streams {
 public:
  Streams(const StreamCall& call, Outcome& outcome)
      : call_(call),
        times_(outcome.times),
        notes_(outcome.notes),
        tables_(std::move(outcome.tables)) {
    for (const void* points : tables_.back()) {
      points_.push_back(static_cast<StreamPoints*>(const_cast<void*>(points)));
    }
    tables_.pop_back();
  }

  // Reads what peers lend once it is ready, and tells them when it has been read.
  Failure Read() {
    Failure failure = AwaitPeers();
    times_.Note(&StreamTimes::began);
    if (!failure) failure = CudaFailure(call_, PutReading());
    // Whatever came of it, as others have gone on to the other half.
    if (call_.window != nullptr) call_.window->Advance();
    Own().recorded.Set(failure ? StreamPoints::kNever : StreamPoints::kYes);
    times_.Note(&StreamTimes::ended);
    return failure;
  }

  // Has the stream wait until all of this process have read what this rank lends. Those
  // of others read the window.
  Failure AwaitReaders(std::chrono::duration<double> timeout) {
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                             std::min(timeout, kLongestWait));
    for (std::size_t peer = 0; peer < points_.size(); ++peer) {
      if (IsOwn(peer) || !IsHere(peer)) continue;
      const std::uint32_t recorded = points_[peer]->recorded.Await(deadline);
      if (recorded != StreamPoints::kYes) return Unread(peer, recorded, timeout);
      const cudaError_t error =
          cudaStreamWaitEvent(call_.stream, points_[peer]->done, 0);
      if (error != cudaSuccess) return CudaFailure(call_, error);
    }
    times_.Note(&StreamTimes::told);
    // If it failed, other ranks may still look at them.
    for (std::size_t peer = 0; peer < points_.size(); ++peer) {
      if (IsHere(peer)) ReleaseStreamPoints(points_[peer]);
    }
    return std::nullopt;
  }

 private:
  // All of them, whatever becomes of one: nothing else keeps later exchanges from
  // writing where these still read.
  Failure AwaitPeers() {
    Failure first;
    for (std::size_t peer = 0; peer < points_.size(); ++peer) {
      if (IsOwn(peer)) continue;
      const cudaError_t error =
          IsHere(peer) ? cudaStreamWaitEvent(call_.stream, points_[peer]->ready, 0)
                       : AwaitWindow(peer);
      if (error != cudaSuccess && !first) first = Unreadable(peer, error);
    }
    return first;
  }

  cudaError_t PutReading() {
    PeerTables tables;
    for (const auto& table : tables_) tables.push_back(table.data());
    cudaError_t error = call_.launch(tables);
    if (error == cudaSuccess) error = cudaEventRecord(Own().done, call_.stream);
    return error;
  }

  // Finds what a rank of another process lends in its window.
  cudaError_t AwaitWindow(std::size_t peer) {
    const char* half = nullptr;
    const cudaError_t error = call_.window->AwaitReady(
        static_cast<std::int32_t>(peer), notes_[peer], call_.stream, half);
    if (error != cudaSuccess) return error;
    const HalfLayout layout = DeviceWindow::LayoutOf(call_.attendance.lent);
    for (std::size_t lent = 0; lent < tables_.size(); ++lent) {
      tables_[lent][peer] = layout.Place(half, 0, lent);
    }
    return cudaSuccess;
  }

  Failure Unreadable(std::size_t peer, cudaError_t error) const {
    std::string what = WhoOf(call_) + " could not read what " +
                       RankList({static_cast<std::int32_t>(peer)});
    if (!IsHere(peer)) {
      const std::int32_t process = call_.attendance.span->process_of[peer];
      what += " of process " + std::to_string(process);
    }
    what += " lends: " + CudaSays(error);
    return StreamFailure{.what = std::move(what), .is_of_cuda = true};
  }

  Failure Unread(std::size_t peer, std::uint32_t recorded,
                 std::chrono::duration<double> timeout) const {
    const std::string who = RankList({static_cast<std::int32_t>(peer)});
    if (recorded == StreamPoints::kNever) {
      return StreamFailure{
          .what = WhoOf(call_) + " goes without " + who + ", which could not launch",
          .is_of_cuda = true};
    }
    return StreamFailure{.what = WhoOf(call_) + " waited " + Seconds(timeout) +
                                 " for " + who + " to launch its kernels",
                         .is_of_cuda = false};
  }

  bool IsOwn(std::size_t rank) const {
    return static_cast<std::int32_t>(rank) == call_.attendance.rank;
  }
  bool IsHere(std::size_t rank) const { return IsOfThisProcess(call_, rank); }
  StreamPoints& Own() {
    return *points_[static_cast<std::size_t>(call_.attendance.rank)];
  }

  const StreamCall& call_;
  TimedStream& times_;
  const std::vector<WindowNote>& notes_;
  std::vector<std::vector<const void*>> tables_;  // [lent buffers][ranks]
  std::vector<StreamPoints*> points_;             // by rank; null elsewhere
};

// Makes what the rank lends, where it has to: then that is its place in the window.
cudaError_t Prepare(StreamCall& call, std::vector<void*>& places) {
  std::vector<Lent>& lent = call.attendance.lent;
  if (call.window != nullptr) {
    const cudaError_t error = call.window->MakeRoom(lent, places);
    if (error != cudaSuccess) return error;
  }
  if (call.prepare) {
    const cudaError_t error = call.prepare(places);
    if (error != cudaSuccess) return error;
  }
  for (std::size_t i = 0; i < places.size(); ++i) {
    if (lent[i].data == nullptr) lent[i].data = places[i];
  }
  return cudaSuccess;
}

// Puts on the stream that what the rank lends is ready, and where others find it.
cudaError_t Lend(StreamCall& call, Outcome& outcome) {
  std::int32_t num_here = 0;
  for (std::int32_t rank = 0; rank < call.attendance.num_ranks; ++rank) {
    if (IsOfThisProcess(call, static_cast<std::size_t>(rank))) ++num_here;
  }
  std::vector<void*> places;
  cudaError_t error = Prepare(call, places);
  if (error == cudaSuccess) outcome.points = TakeStreamPoints(num_here, error);
  if (error == cudaSuccess) error = cudaEventRecord(outcome.points->ready, call.stream);
  if (error == cudaSuccess && call.window != nullptr) {
    error =
        call.window->Publish(call.attendance.lent, places, call.stream, outcome.note);
  }
  // Behind what peers wait for, so that they do not wait for this.
  if (error == cudaSuccess && call.stamp != nullptr) {
    outcome.times = TimedStream(call.stamp, call.stream);
    outcome.times.Note(&StreamTimes::came);
  }
  return error;
}

}  // namespace

std::optional<StreamFailure> ExchangeOnStreams(MeetingPoint& point, StreamCall call) {
  const auto outcome = std::make_shared<Outcome>();
  if (Failure failure = CudaFailure(call, Lend(call, *outcome))) return failure;
  MeetPeers(point, call.attendance, outcome);
  if (outcome->failure) {
    // Nobody has looked at them.
    outcome->points->num_users.store(1, std::memory_order_relaxed);
    ReleaseStreamPoints(outcome->points);
    return StreamFailure{.what = *outcome->failure, .is_of_cuda = false};
  }
  outcome->times.Belong({.exchange = outcome->exchange,
                         .rank = call.attendance.rank,
                         .device = outcome->points->device});
  Streams streams(call, *outcome);
  if (Failure failure = streams.Read()) return failure;
  return streams.AwaitReaders(point.timeout());
}

}  // namespace jax_ep
