#ifndef JAX_EP_FFI_FABRIC_THREADS_MEETING_H_
#define JAX_EP_FFI_FABRIC_THREADS_MEETING_H_

#include <array>
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
#include "fabric/work/work_share.h"

namespace jax_ep {

// Which exchange a rank takes part in. Ranks whose devices run one program meet at the
// same custom call of it, once per time that it runs.
struct MeetingKey {
  std::int64_t run_id;     // one execution of one program
  std::int64_t call_site;  // one custom call in it
  std::int32_t group;      // which of the groups along the mesh's other axes
  bool operator==(const MeetingKey&) const = default;
};

// Of a lent buffer: rows, bytes of a row.
using Dims = std::array<std::int64_t, 2>;

// What all ranks of an exchange must agree on.
struct CallPrint {
  const char* op;
  Dims dims;
  std::uint32_t plan = 0;
  bool operator==(const CallPrint& other) const;
};

// Buffers of one rank that its peers read until the exchange has ended.
using Lent = std::array<const void*, 2>;

// For each lent buffer, a table of all ranks' ones.
using PeerTables = std::array<const void* const*, 2>;

// Takes what went wrong, or nothing when the exchange is done.
using Done = std::function<void(const std::optional<std::string>& failure)>;

struct Meeting;

// Takes an exchange on from where the ranks of this process have met.
class Relay {
 public:
  virtual ~Relay() = default;

  // Called when all ranks of this process have come; sees to it that all are told.
  virtual void Take(std::shared_ptr<Meeting> meeting) = 0;

  // Called when they will not come, while the meeting point is locked.
  virtual void Break(const std::string& why) = 0;
};

// Ranks in several processes that exchange with each other.
struct Span {
  std::vector<std::int32_t> process_of;  // by rank
  std::int32_t here;                     // this process
  std::int64_t site;                     // the call's, the same in all processes
  std::int64_t first_run;                // the run in which they agreed on it
  std::shared_ptr<Relay> relay;

  bool IsHere(std::int64_t rank) const {
    return process_of[static_cast<std::size_t>(rank)] == here;
  }
};

// How a rank copies what it lends to where other processes can read it: its work, given
// a place for each of its lent buffers.
using MakePublication = std::function<Work(const std::array<void*, 2>& places)>;

// One rank's part in an exchange.
struct Attendance {
  MeetingKey key;
  CallPrint print;
  std::int32_t rank;
  std::int32_t num_ranks;
  Lent lent;
  // Makes this rank's work. The tables fill up while ranks arrive and must only be read
  // when the work runs. What the work refers to must live until `done` is called.
  std::function<Work(const PeerTables&)> make_work;
  // Called once, from any thread. It may go on to run whatever the rank does next.
  Done done;
  // For helpers and for the peers' `done`; used only while Attend runs.
  Schedule schedule;
  // If there are peers in other processes: who, how much of each lent buffer they are
  // to find, and how it gets there.
  std::shared_ptr<const Span> span = nullptr;
  std::array<std::int64_t, 2> lent_bytes = {};
  MakePublication make_publication = nullptr;
};

// The ranks of this process in one exchange, coming together.
struct Meeting {
  explicit Meeting(const Attendance& first);
  bool IsComplete() const { return num_present == num_expected; }
  bool IsExpected(std::size_t rank) const {
    return span == nullptr || span->IsHere(static_cast<std::int64_t>(rank));
  }
  std::vector<std::int32_t> Missing() const;

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
  std::array<std::int64_t, 2> lent_bytes;
  std::int32_t first_rank;
  std::chrono::steady_clock::time_point deadline;
  std::chrono::duration<double> timeout{};
  std::size_t num_present = 0;
  std::size_t num_expected = 0;
  std::vector<bool> present;
  // The rest by rank too; empty for ranks of other processes.
  std::array<std::vector<const void*>, 2> tables;
  std::vector<Work> works;
  std::vector<MakePublication> publications;
  std::vector<Done> done;
  std::optional<std::string> failure;
};

// Tells ranks that their exchange is done, by the tasks that it schedules. What a rank
// does next may wait for its peers, so each could be told on a thread of its own; but
// as a rule it takes less time than waking one.
void TellAll(std::vector<Done> untold, const Schedule& schedule);

// How long ranks wait for each other until somebody sets another limit. XLA:CPU aborts
// a process whose collectives have waited for a minute: by then our error has been
// told.
inline constexpr std::chrono::duration<double> kDefaultWait{30};

// The steady clock cannot hold every number of seconds; a year is as good as for ever.
inline constexpr std::chrono::duration<double> kLongestWait{3.15e7};

// For errors: "rank 1", "ranks 1, 2", "1.5 s".
std::string RankList(const std::vector<std::int32_t>& ranks);
std::string Seconds(std::chrono::duration<double> duration);

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

  std::shared_ptr<Meeting> Join(const Attendance& attendance);
  void Register(const Attendance& attendance, Meeting& meeting);
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
