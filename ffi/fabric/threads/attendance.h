// What a rank brings to an exchange: which call it is, what it lends, and its work.
// Made by ffi/bind/cpu for each call; taken by MeetingPoint.

#ifndef JAX_EP_FFI_FABRIC_THREADS_ATTENDANCE_H_
#define JAX_EP_FFI_FABRIC_THREADS_ATTENDANCE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
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

// What all ranks of an exchange must agree on.
struct CallPrint {
  const char* op;
  std::int64_t rows;
  std::int64_t row_bytes;  // of all lent buffers together
  std::uint32_t plan = 0;
  bool operator==(const CallPrint& other) const {
    return std::string_view(op) == other.op && rows == other.rows &&
           row_bytes == other.row_bytes && plan == other.plan;
  }
};

// A buffer of one rank that its peers read until the exchange has ended. All ranks of
// an exchange lend equally many, and as much of each.
struct Lent {
  const void* data = nullptr;
  // How much of it other processes are to find; 0: it is for this process alone.
  std::int64_t shared_bytes = 0;
};

// For each lent buffer, a table of all ranks' ones.
using PeerTables = std::vector<const void* const*>;

// Takes what went wrong, or nothing when the exchange is done.
using Done = std::function<void(const std::optional<std::string>& failure)>;

struct Meeting;
class LoggedCall;

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
  std::int64_t group = 0;  // which ranks these are, the same in all processes

  bool IsHere(std::int64_t rank) const {
    return process_of[static_cast<std::size_t>(rank)] == here;
  }
};

// How a rank copies what it lends to where other processes can read it: its works,
// given a place for each of its lent buffers, null where none of it is shared.
using MakePublication = std::function<std::vector<Work>(const std::vector<void*>&)>;

// One rank's part in an exchange.
struct Attendance {
  MeetingKey key;
  CallPrint print;
  std::int32_t rank;
  std::int32_t num_ranks;
  std::vector<Lent> lent;
  // Makes this rank's works. The tables fill up while ranks arrive and must only be
  // read when the works run, which is when the vector of them may be gone. What the
  // works refer to must live until `done` is called.
  std::function<std::vector<Work>(const PeerTables&)> make_work;
  // Called once, from any thread. It may go on to run whatever the rank does next.
  Done done;
  // For helpers and for the peers' `done`; used only while Attend runs. Without one the
  // thread does all of it.
  Schedule schedule;
  // If there are peers in other processes: who, and how they get what they are to find.
  std::shared_ptr<const Span> span = nullptr;
  MakePublication make_publication = nullptr;
  // If calls are logged: what is to know when its peers have come.
  std::shared_ptr<LoggedCall> log = nullptr;
  // If there is one, and calls are recorded: takes the exchange's number while Attend
  // runs.
  std::int64_t* exchange = nullptr;
  // For records of calls: the layer's name in the program, and who meets. Never freed.
  const char* scope = "";
  const char* fabric = "devices";
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_THREADS_ATTENDANCE_H_
