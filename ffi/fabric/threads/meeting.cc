// Where the ranks of one process come together for an exchange, and what becomes of it.
// Used by ffi/bind/cpu for every call, and by channels for those that span processes.

#include "fabric/threads/meeting.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fabric/threads/call_log.h"
#include "fabric/threads/describe.h"
#include "fabric/threads/recorder.h"
#include "fabric/threads/recording.h"
#include "fabric/threads/report.h"

namespace jax_ep {
namespace {

// Failed meetings are remembered for ranks that come late. A rank that never comes
// leaves one behind, of a few hundred bytes, so there is a limit to how many: more than
// a program has calls in flight, and a few MB.
constexpr std::size_t kMaxOpen = 4096;

std::string GaveUp(std::size_t num_ranks, const std::string& why) {
  return " of " + std::to_string(num_ranks) + " gave up, because " + why;
}

Caller CallerOf(std::int32_t rank, const CallPrint& print,
                const std::vector<std::int64_t>& shared_bytes) {
  return {.who = "rank " + std::to_string(rank),
          .print = print,
          .lent = SumOf(shared_bytes)};
}

}  // namespace

void TellAll(std::vector<Done> untold, const Schedule& schedule) {
  if (!schedule) {
    for (const Done& done : untold) {
      if (done) done(std::nullopt);
    }
    return;
  }
  struct Untold {
    explicit Untold(std::vector<Done> all) : done(std::move(all)) {}
    std::mutex mutex;
    std::vector<Done> done;
  };
  const std::size_t count = untold.size();
  const auto rest = std::make_shared<Untold>(std::move(untold));
  const auto next = [rest]() -> Done {
    const std::scoped_lock lock(rest->mutex);
    if (rest->done.empty()) return nullptr;
    Done done = std::move(rest->done.back());
    rest->done.pop_back();
    return done;
  };
  const auto nobody_left = [&] {
    const std::scoped_lock lock(rest->mutex);
    return rest->done.empty();
  };
  for (std::size_t i = 0; i < count && !nobody_left(); ++i) {
    schedule([next] {
      while (const Done done = next()) done(std::nullopt);
    });
  }
}

void TellFailed(std::vector<Meeting::Notice> notices, const Schedule& schedule) {
  for (Meeting::Notice& notice : notices) {
    if (schedule) {
      schedule([notice = std::move(notice)] { notice.done(notice.failure); });
    } else {
      notice.done(notice.failure);
    }
  }
}

Meeting::Meeting(const Attendance& first)
    : key(first.key),
      print(first.print),
      span(first.span),
      first_rank(first.rank),
      present(static_cast<std::size_t>(first.num_ranks)),
      buffers(first.lent.size() * present.size()),
      publications(span == nullptr ? 0 : present.size()),
      done(present.size()) {
  shared_bytes.reserve(first.lent.size());
  peers.reserve(first.lent.size());
  for (const Lent& lent : first.lent) {
    shared_bytes.push_back(lent.shared_bytes);
    peers.push_back(buffers.data() + peers.size() * present.size());
  }
  for (std::size_t rank = 0; rank < present.size(); ++rank) {
    if (IsExpected(rank)) ++num_expected;
  }
  works.reserve(num_expected);
}

std::optional<std::string> Meeting::Mismatch(const Attendance& attendance) const {
  const bool lends_alike =
      std::ranges::equal(attendance.lent, shared_bytes, {}, &Lent::shared_bytes);
  if (print == attendance.print && lends_alike) return std::nullopt;
  std::vector<std::int64_t> theirs;
  theirs.reserve(attendance.lent.size());
  for (const Lent& lent : attendance.lent) theirs.push_back(lent.shared_bytes);
  return DescribeMismatch(CallerOf(first_rank, print, shared_bytes),
                          CallerOf(attendance.rank, attendance.print, theirs));
}

void Meeting::NotePresent(const Attendance& attendance, std::int64_t came) {
  const auto rank = static_cast<std::size_t>(attendance.rank);
  present[rank] = true;
  ++num_present;
  done[rank] = attendance.done;
  if (attendance.log) logged.push_back(attendance.log);
  if (num_present == 1 && came != 0) {
    recording = std::make_shared<Recording>(attendance, num_expected);
  }
  if (recording == nullptr) return;
  recording->NoteArrival(attendance.rank, came);
  if (attendance.exchange != nullptr) *attendance.exchange = recording->exchange();
  done[rank] = Noted(recording, std::move(done[rank]));
}

void Meeting::NoteEpoch(std::uint64_t epoch, std::int64_t named) const {
  for (const auto& call : logged) call->NoteEpoch(epoch);
  if (recording) recording->NoteEpoch(epoch, named);
}

void Meeting::NoteBeginning() const {
  for (const auto& call : logged) call->NoteBeginning();
  if (recording) recording->NoteBeginning();
}

void Meeting::NoteEnd() const {
  if (recording) recording->NoteEnd();
}

void Meeting::TakeWorks(const Attendance& attendance) {
  const auto rank = static_cast<std::size_t>(attendance.rank);
  for (std::size_t i = 0; i < attendance.lent.size(); ++i) {
    SetBuffer(i, rank, attendance.lent[i].data);
  }
  std::ranges::copy(attendance.make_work(peers), std::back_inserter(works));
  if (span) publications[rank] = attendance.make_publication;
}

std::vector<std::int32_t> Meeting::Missing() const {
  std::vector<std::int32_t> missing;
  for (std::size_t rank = 0; rank < present.size(); ++rank) {
    if (IsExpected(rank) && !present[rank])
      missing.push_back(static_cast<std::int32_t>(rank));
  }
  return missing;
}

MeetingPoint::~MeetingPoint() {
  {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
  }
  watch_changed_.notify_all();
  if (watcher_.joinable()) watcher_.join();
}

std::chrono::duration<double> MeetingPoint::SetTimeout(
    std::chrono::duration<double> timeout) {
  const std::scoped_lock lock(mutex_);
  return std::exchange(timeout_, timeout);
}

std::chrono::duration<double> MeetingPoint::timeout() const {
  const std::scoped_lock lock(mutex_);
  return timeout_;
}

void MeetingPoint::Attend(const Attendance& attendance) {
  const std::int64_t came = RecordsCalls() ? SteadyNow() : 0;
  if (LogsCalls()) {
    TakePart(Logged(attendance), came);
  } else {
    TakePart(attendance, came);
  }
}

void MeetingPoint::TakePart(const Attendance& attendance, std::int64_t came) {
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Meeting> meeting = Join(attendance);
  meeting->NotePresent(attendance, came);
  std::vector<Notice> notices;
  if (meeting->failure) {
    notices = Fail(*meeting, *meeting->failure);
  } else if (const auto mismatch = meeting->Mismatch(attendance)) {
    notices = Fail(*meeting, *mismatch);
  } else {
    meeting->TakeWorks(attendance);
  }
  const bool is_last = meeting->IsComplete();
  const bool failed = meeting->failure.has_value();
  if (is_last) Forget(*meeting);
  if (!is_last && !failed) WatchUntil(meeting->deadline);
  lock.unlock();  // from here on, only the last rank may look at the meeting

  TellFailed(std::move(notices), attendance.schedule);
  if (failed || !is_last) return;
  if (meeting->span) {
    meeting->span->relay->Take(meeting);
    return;
  }
  meeting->NoteBeginning();
  RunTogether(std::move(meeting->works), attendance.schedule);
  meeting->NoteEnd();
  const auto own = meeting->done.begin() + attendance.rank;
  const Done tell_own = std::move(*own);
  meeting->done.erase(own);
  TellAll(std::move(meeting->done), attendance.schedule);
  tell_own(std::nullopt);
}

// The oldest meeting of this key that the rank has not been to: in a loop, each rank
// comes to the same call once per turn. A device that repeats a rank (because the mesh
// has axes that the exchange does not know) finds its own.
std::shared_ptr<Meeting> MeetingPoint::Join(const Attendance& attendance) {
  const auto rank = static_cast<std::size_t>(attendance.rank);
  for (const auto& meeting : open_) {
    if (meeting->key == attendance.key && !meeting->present[rank]) return meeting;
  }
  auto meeting = std::make_shared<Meeting>(attendance);
  meeting->timeout = timeout_;
  meeting->deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                         std::min(timeout_, kLongestWait));
  open_.push_back(meeting);
  if (open_.size() > kMaxOpen) {
    const auto failed = std::ranges::find_if(
        open_, [](const auto& m) { return m->failure.has_value(); });
    if (failed != open_.end()) open_.erase(failed);
  }
  return meeting;
}

std::vector<MeetingPoint::Notice> MeetingPoint::Fail(Meeting& meeting,
                                                     const std::string& failure) {
  // Once for all its ranks, however late they come.
  if (!meeting.failure) Report(meeting.ReportOf(failure));
  meeting.failure = failure;
  if (meeting.span) meeting.span->relay->Break(failure);
  return meeting.TakeNotices(failure);
}

std::vector<Meeting::Notice> Meeting::TakeNotices(const std::string& why) {
  std::vector<Notice> notices;
  for (std::size_t rank = 0; rank < done.size(); ++rank) {
    if (!done[rank]) continue;
    notices.push_back({.done = std::exchange(done[rank], nullptr),
                       .failure = std::string(print.op) + ": rank " +
                                  std::to_string(rank) + GaveUp(done.size(), why)});
  }
  return notices;
}

std::string Meeting::ReportOf(const std::string& why) const {
  std::vector<std::int32_t> ranks;
  for (std::size_t rank = 0; rank < done.size(); ++rank) {
    if (done[rank]) ranks.push_back(static_cast<std::int32_t>(rank));
  }
  return std::string(print.op) + ": " + RankList(ranks) + GaveUp(done.size(), why);
}

void MeetingPoint::Forget(const Meeting& meeting) {
  std::erase_if(open_, [&](const auto& open) { return open.get() == &meeting; });
}

// Says where a rank that is missed is waiting instead, if it is.
std::string MeetingPoint::WhereIs(const Meeting& meeting, std::int32_t rank) const {
  for (const auto& open : open_) {
    const bool same_group = open->key.run_id == meeting.key.run_id &&
                            open->key.group == meeting.key.group &&
                            open->present.size() == meeting.present.size();
    if (same_group && open.get() != &meeting && !open->failure &&
        open->present[static_cast<std::size_t>(rank)]) {
      return "; rank " + std::to_string(rank) + " waits in another call, " +
             Describe(open->print);
    }
  }
  return "";
}

// Sees to it that the watcher looks no later than at `deadline`. It is woken only if it
// sleeps beyond that: about once per time-out, however many meetings there are.
void MeetingPoint::WatchUntil(Clock::time_point deadline) {
  if (!watcher_.joinable()) watcher_ = std::thread([this] { Watch(); });
  if (deadline < watched_until_) {
    watched_until_ = deadline;
    watch_changed_.notify_all();
  }
}

void MeetingPoint::Watch() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const std::vector<Notice> notices = FailExpired();
    if (!notices.empty()) {
      lock.unlock();
      for (const Notice& notice : notices) notice.done(notice.failure);
      lock.lock();
      continue;
    }
    watched_until_ = NextDeadline();
    const Clock::time_point until = watched_until_;
    const auto changed = [&] { return stopping_ || watched_until_ < until; };
    if (until == Clock::time_point::max()) {
      watch_changed_.wait(lock, changed);
    } else {
      watch_changed_.wait_until(lock, until, changed);
    }
  }
}

std::vector<MeetingPoint::Notice> MeetingPoint::FailExpired() {
  std::vector<Notice> notices;
  for (const auto& meeting : open_) {
    if (meeting->failure || meeting->deadline > Clock::now()) continue;
    std::string failure = "rank " + std::to_string(meeting->first_rank) + " waited " +
                          Seconds(meeting->timeout) + " for " +
                          RankList(meeting->Missing()) + " to come";
    for (const std::int32_t rank : meeting->Missing()) {
      failure += WhereIs(*meeting, rank);
    }
    std::ranges::move(Fail(*meeting, failure), std::back_inserter(notices));
  }
  return notices;
}

MeetingPoint::Clock::time_point MeetingPoint::NextDeadline() const {
  Clock::time_point next = Clock::time_point::max();
  for (const auto& meeting : open_) {
    if (!meeting->failure) next = std::min(next, meeting->deadline);
  }
  return next;
}

}  // namespace jax_ep
