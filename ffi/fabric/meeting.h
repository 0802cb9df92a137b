#ifndef JAX_EP_FFI_FABRIC_MEETING_H_
#define JAX_EP_FFI_FABRIC_MEETING_H_

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cpu/work.h"
#include "fabric/work_share.h"

namespace jax_ep {

// Which exchange a rank takes part in. Ranks whose devices run one program meet at the
// same custom call of it, once per time that it runs.
struct MeetingKey {
  std::int64_t run_id;     // one execution of one program
  std::int64_t call_site;  // one custom call in it
  std::int32_t group;      // which of the groups along the mesh's other axes
  bool operator==(const MeetingKey&) const = default;
};

// What all ranks of an exchange must agree on.
struct CallPrint {
  const char* op;
  std::array<std::int64_t, 2> dims;  // of the lent buffer: rows, bytes of a row
  std::uint32_t plan;
  bool operator==(const CallPrint& other) const;
};

// Buffers of one rank that its peers read until the exchange has ended.
using Lent = std::array<const void*, 2>;

// For each lent buffer, a table of all ranks' ones.
using PeerTables = std::array<const void* const*, 2>;

// One rank's part in an exchange.
struct Attendance {
  MeetingKey key;
  CallPrint print;
  std::int32_t rank;
  std::int32_t num_ranks;
  Lent lent;
  // Makes this rank's work. The tables fill up while ranks arrive and must only be read
  // when the work runs.
  std::function<Work(const PeerTables&)> make_work;
  Schedule schedule;  // for helpers, where there are more cores than ranks
};

// Where the device threads of one process meet. A rank arrives with its buffers, waits
// until all its peers have, and the threads that are awake then share out the work of
// all ranks. Nobody leaves before everybody's work has ended, so lent buffers stay
// valid while they are read. Waiting for peers is bounded; after that only work that is
// already running remains.
class MeetingPoint {
 public:
  MeetingPoint() = default;
  MeetingPoint(const MeetingPoint&) = delete;
  MeetingPoint& operator=(const MeetingPoint&) = delete;

  // Returns nothing when the exchange is done, or what went wrong: then no rank's work
  // has run or will.
  std::optional<std::string> Attend(const Attendance& attendance);

  // Sets how long a rank waits for its peers; returns the limit until now.
  std::chrono::duration<double> SetTimeout(std::chrono::duration<double> timeout);

 private:
  enum class Phase { kGathering, kWorking, kDone, kFailed };

  struct Meeting {
    explicit Meeting(const Attendance& first);
    std::vector<std::int32_t> Missing() const;

    MeetingKey key;
    CallPrint print;
    std::int32_t first_rank;
    Phase phase = Phase::kGathering;
    std::int32_t num_present = 0;
    std::vector<bool> present;
    std::array<std::vector<const void*>, 2> tables;
    std::vector<Work> works;
    std::optional<WorkShare> share;
    std::condition_variable changed;
    std::string failure;
  };

  std::shared_ptr<Meeting> Join(const Attendance& attendance);
  void Arrive(const Attendance& attendance, const std::shared_ptr<Meeting>& meeting);
  void StartWork(const Attendance& attendance, const std::shared_ptr<Meeting>& meeting);
  void AwaitPeers(const Attendance& attendance, Meeting& meeting,
                  std::unique_lock<std::mutex>& lock);
  void Fail(Meeting& meeting, std::string failure);
  void Forget(const Meeting& meeting);
  void Help(Meeting& meeting);
  std::string WhereIs(const Meeting& meeting, std::int32_t rank) const;

  std::mutex mutex_;  // guards everything but WorkShare's own counters
  std::deque<std::shared_ptr<Meeting>> open_;  // gathering or failed, oldest first
  std::chrono::duration<double> timeout_{60.0};
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_MEETING_H_
