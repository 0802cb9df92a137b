#include "fabric/meeting.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace jax_ep {
namespace {

// Failed meetings are remembered for ranks that come late. A rank that never comes
// leaves one behind, so there is a limit to how many.
constexpr std::size_t kMaxOpen = 4096;

std::string Ranks(const std::vector<std::int32_t>& ranks) {
  std::string text = ranks.size() == 1 ? "rank" : "ranks";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    text += (i == 0 ? " " : ", ") + std::to_string(ranks[i]);
  }
  return text;
}

std::string Seconds(std::chrono::duration<double> duration) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.1f s", duration.count());
  return text.data();
}

std::string Describe(const CallPrint& print) {
  return std::string(print.op) + " of [" + std::to_string(print.dims[0]) + " rows, " +
         std::to_string(print.dims[1]) + " bytes] with plan fingerprint " +
         std::to_string(print.plan);
}

}  // namespace

bool CallPrint::operator==(const CallPrint& other) const {
  return std::strcmp(op, other.op) == 0 && dims == other.dims && plan == other.plan;
}

MeetingPoint::Meeting::Meeting(const Attendance& first)
    : key(first.key),
      print(first.print),
      first_rank(first.rank),
      present(static_cast<std::size_t>(first.num_ranks)),
      works(static_cast<std::size_t>(first.num_ranks)) {
  for (auto& table : tables) table.resize(static_cast<std::size_t>(first.num_ranks));
}

std::vector<std::int32_t> MeetingPoint::Meeting::Missing() const {
  std::vector<std::int32_t> missing;
  for (std::size_t rank = 0; rank < present.size(); ++rank) {
    if (!present[rank]) missing.push_back(static_cast<std::int32_t>(rank));
  }
  return missing;
}

std::chrono::duration<double> MeetingPoint::SetTimeout(
    std::chrono::duration<double> timeout) {
  const std::scoped_lock lock(mutex_);
  return std::exchange(timeout_, timeout);
}

std::optional<std::string> MeetingPoint::Attend(const Attendance& attendance) {
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Meeting> meeting = Join(attendance);
  Arrive(attendance, meeting);
  AwaitPeers(attendance, *meeting, lock);
  if (meeting->phase == Phase::kFailed) {
    return std::string(attendance.print.op) + ": rank " +
           std::to_string(attendance.rank) + " of " +
           std::to_string(attendance.num_ranks) + " gave up, because " +
           meeting->failure;
  }
  lock.unlock();
  Help(*meeting);
  lock.lock();
  meeting->changed.wait(lock, [&] { return meeting->phase == Phase::kDone; });
  return std::nullopt;
}

// The oldest meeting of this key that the rank has not been to: in a loop, each rank
// comes to the same call once per turn. A device that repeats a rank (because the mesh
// has axes that the exchange does not know) finds its own.
std::shared_ptr<MeetingPoint::Meeting> MeetingPoint::Join(
    const Attendance& attendance) {
  const auto rank = static_cast<std::size_t>(attendance.rank);
  for (const auto& meeting : open_) {
    if (meeting->key == attendance.key && !meeting->present[rank]) return meeting;
  }
  auto meeting = std::make_shared<Meeting>(attendance);
  open_.push_back(meeting);
  if (open_.size() > kMaxOpen) {
    const auto failed = std::ranges::find_if(
        open_, [](const auto& m) { return m->phase == Phase::kFailed; });
    if (failed != open_.end()) open_.erase(failed);
  }
  return meeting;
}

void MeetingPoint::Arrive(const Attendance& attendance,
                          const std::shared_ptr<Meeting>& meeting) {
  const auto rank = static_cast<std::size_t>(attendance.rank);
  meeting->present[rank] = true;
  ++meeting->num_present;
  const bool complete = meeting->num_present == attendance.num_ranks;
  if (meeting->phase == Phase::kGathering && !(meeting->print == attendance.print)) {
    Fail(*meeting, "rank " + std::to_string(meeting->first_rank) + " called " +
                       Describe(meeting->print) + " and rank " +
                       std::to_string(attendance.rank) + " called " +
                       Describe(attendance.print));
  }
  if (meeting->phase == Phase::kGathering) {
    PeerTables tables;
    for (std::size_t i = 0; i < tables.size(); ++i) {
      meeting->tables[i][rank] = attendance.lent[i];
      tables[i] = meeting->tables[i].data();
    }
    meeting->works[rank] = attendance.make_work(tables);
    if (complete) StartWork(attendance, meeting);
  }
  if (complete) Forget(*meeting);
}

// Wakes as many of the waiting ranks as there are cores to work on, and asks for
// helpers where there are more cores than ranks. The others sleep until the work has
// ended.
void MeetingPoint::StartWork(const Attendance& attendance,
                             const std::shared_ptr<Meeting>& meeting) {
  meeting->share.emplace(std::move(meeting->works));
  meeting->phase = meeting->share->num_chunks() == 0 ? Phase::kDone : Phase::kWorking;
  const std::int64_t threads = UsefulThreads(meeting->share->num_chunks());
  if (meeting->phase == Phase::kDone) meeting->changed.notify_all();
  for (std::int64_t i = 1; i < std::min<std::int64_t>(threads, attendance.num_ranks);
       ++i) {
    meeting->changed.notify_one();
  }
  for (std::int64_t i = attendance.num_ranks; i < threads; ++i) {
    attendance.schedule([this, meeting] { Help(*meeting); });
  }
}

void MeetingPoint::AwaitPeers(const Attendance& attendance, Meeting& meeting,
                              std::unique_lock<std::mutex>& lock) {
  const std::chrono::duration<double> timeout = timeout_;
  // steady_clock cannot hold every finite number of seconds; a year is as good.
  const auto bounded = std::min(timeout, std::chrono::duration<double>(3.15e7));
  const auto deadline =
      std::chrono::steady_clock::now() +
      std::chrono::duration_cast<std::chrono::steady_clock::duration>(bounded);
  const auto gathered = [&] { return meeting.phase != Phase::kGathering; };
  if (meeting.changed.wait_until(lock, deadline, gathered)) return;
  std::string failure = "rank " + std::to_string(attendance.rank) + " waited " +
                        Seconds(timeout) + " for " + Ranks(meeting.Missing()) +
                        " to come";
  for (const std::int32_t rank : meeting.Missing()) failure += WhereIs(meeting, rank);
  Fail(meeting, std::move(failure));
}

void MeetingPoint::Fail(Meeting& meeting, std::string failure) {
  meeting.phase = Phase::kFailed;
  meeting.failure = std::move(failure);
  meeting.changed.notify_all();
}

void MeetingPoint::Forget(const Meeting& meeting) {
  std::erase_if(open_, [&](const auto& open) { return open.get() == &meeting; });
}

void MeetingPoint::Help(Meeting& meeting) {
  if (!meeting.share->Drain()) return;
  const std::scoped_lock lock(mutex_);
  meeting.phase = Phase::kDone;
  meeting.changed.notify_all();
}

// Says where a rank that is missed is waiting instead, if it is.
std::string MeetingPoint::WhereIs(const Meeting& meeting, std::int32_t rank) const {
  for (const auto& open : open_) {
    const bool same_group = open->key.run_id == meeting.key.run_id &&
                            open->key.group == meeting.key.group &&
                            open->present.size() == meeting.present.size();
    if (same_group && open.get() != &meeting && open->phase == Phase::kGathering &&
        open->present[static_cast<std::size_t>(rank)]) {
      return "; rank " + std::to_string(rank) + " waits in another call, " +
             Describe(open->print);
    }
  }
  return "";
}

}  // namespace jax_ep
