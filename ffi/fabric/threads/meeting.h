// Where the ranks of one process come together for an exchange, and what becomes of it.
// Used by ffi/bind/cpu for every call, and by channels for those that span processes.

#ifndef JAX_EP_FFI_FABRIC_THREADS_MEETING_H_
#define JAX_EP_FFI_FABRIC_THREADS_MEETING_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/work.h"
#include "fabric/threads/attendance.h"
#include "fabric/threads/call_log.h"
#include "fabric/threads/recording.h"
#include "fabric/work/work_share.h"

namespace jax_ep {

// The ranks of this process in one exchange, coming together.
struct Meeting {
  explicit Meeting(const Attendance& first);
  bool IsComplete() const { return num_present == num_expected; }
  bool IsExpected(std::size_t rank) const {
    return span == nullptr || span->IsHere(static_cast<std::int64_t>(rank));
  }
  std::vector<std::int32_t> Missing() const;

  // Returns how a rank's call differs from that of the first, if it does.
  std::optional<std::string> Mismatch(const Attendance& attendance) const;

  // Takes what a rank brings: that it is there, since when if calls are recorded and
  // else 0; and, where it fits, its buffers and works.
  void NotePresent(const Attendance& attendance, std::int64_t came);
  void TakeWorks(const Attendance& attendance);

  // For the logs of those that it holds, and for its recording.
  void NoteEpoch(std::uint64_t epoch, std::int64_t named) const;
  void NoteBeginning() const;
  void NoteEnd() const;

  void SetBuffer(std::size_t lent, std::size_t rank, const void* data) {
    buffers[lent * present.size() + rank] = data;
  }

  // Takes out whom to tell, and what, when it has failed: all that came and have not
  // been told.
  struct Notice {
    Done done;
    std::string failure;
  };
  std::vector<Notice> TakeNotices(const std::string& why);

  // For users who may not get to see any rank's error.
  std::string ReportOf(const std::string& why) const;

  MeetingKey key;
  CallPrint print;
  std::shared_ptr<const Span> span;
  std::vector<std::int64_t> shared_bytes;  // of each lent buffer
  std::int32_t first_rank;
  std::chrono::steady_clock::time_point deadline;
  std::chrono::duration<double> timeout{};
  std::size_t num_present = 0;
  std::size_t num_expected = 0;
  std::vector<bool> present;
  std::vector<const void*> buffers;  // [lent buffers, ranks]
  PeerTables peers;                  // the rows of `buffers`
  std::vector<Work> works;           // of those that came
  // By rank too; empty for ranks of other processes, the first one's if there are none.
  std::vector<MakePublication> publications;
  std::vector<Done> done;
  std::vector<std::shared_ptr<LoggedCall>> logged;  // of those that came
  std::shared_ptr<Recording> recording;             // or null
  std::optional<std::string> failure;
};

// Tells ranks that their exchange is done, by the tasks that it schedules. What a rank
// does next may wait for its peers, so each could be told on a thread of its own; but
// as a rule it takes less time than waking one.
void TellAll(std::vector<Done> untold, const Schedule& schedule);

// The same for ranks whose exchange has failed.
void TellFailed(std::vector<Meeting::Notice> notices, const Schedule& schedule);

// How long ranks wait for each other until somebody sets another limit. XLA:CPU aborts
// a process whose collectives have waited for a minute: by then our error has been
// told.
inline constexpr std::chrono::duration<double> kDefaultWait{30};

// The steady clock cannot hold every number of seconds; a year is as good as for ever.
inline constexpr std::chrono::duration<double> kLongestWait{3.15e7};

// Where the device threads of one process meet. A rank that arrives leaves its buffers
// and its work, and its thread goes on: a thread that waited here could be the one that
// a peer needs to arrive. The last to arrive runs the work of all ranks, with helpers,
// and has everybody told. So lent buffers stay valid while they are read, and no rank
// is told before everybody's work has ended. If peers do not come in time, those that
// came are told so by a thread that otherwise sleeps. An exchange that spans processes
// is handed to its relay instead, once the ranks of this process have come.
class MeetingPoint {
 public:
  MeetingPoint() = default;
  ~MeetingPoint();
  MeetingPoint(const MeetingPoint&) = delete;
  MeetingPoint& operator=(const MeetingPoint&) = delete;

  // Takes part in an exchange. Returns at once, or, for the last rank, when the work
  // has been run. On failure no rank's work has run or will.
  void Attend(const Attendance& attendance);

  // Sets how long a rank waits for its peers, from now on; returns the limit until now.
  std::chrono::duration<double> SetTimeout(std::chrono::duration<double> timeout);
  std::chrono::duration<double> timeout() const;

 private:
  using Clock = std::chrono::steady_clock;

  using Notice = Meeting::Notice;

  void TakePart(const Attendance& attendance, std::int64_t came);
  std::shared_ptr<Meeting> Join(const Attendance& attendance);
  std::vector<Notice> Fail(Meeting& meeting, const std::string& failure);
  void Forget(const Meeting& meeting);
  std::string WhereIs(const Meeting& meeting, std::int32_t rank) const;
  void WatchUntil(Clock::time_point deadline);
  void Watch();
  std::vector<Notice> FailExpired();
  Clock::time_point NextDeadline() const;

  mutable std::mutex mutex_;                   // guards all below
  std::deque<std::shared_ptr<Meeting>> open_;  // gathering or failed, oldest first
  std::chrono::duration<double> timeout_{kDefaultWait};
  std::thread watcher_;
  Clock::time_point watched_until_ = Clock::time_point::max();
  std::condition_variable watch_changed_;
  bool stopping_ = false;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_THREADS_MEETING_H_
