// One exchange while it is recorded: its times, as they come to be known.
// Held by meetings, if calls are recorded when the first rank comes; and by
// ffi/bind/cpu where nobody waits.

#ifndef JAX_EP_FFI_FABRIC_THREADS_RECORDING_H_
#define JAX_EP_FFI_FABRIC_THREADS_RECORDING_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "fabric/threads/attendance.h"
#include "fabric/threads/recorder.h"

namespace jax_ep {

// All notes but that of a rank's being told are taken one after the other.
class Recording {
 public:
  // Of an exchange to which `first` has come, until so many have been told.
  Recording(const Attendance& first, std::size_t num_told);

  // Its number in this process.
  std::int64_t exchange() const { return record_.exchange; }

  // `when` is 0 if calls were no longer recorded: nothing of the exchange will be.
  void NoteArrival(std::int32_t rank, std::int64_t when);
  // Which exchange between processes it is, and since when this one has been told, if
  // another one leads.
  void NoteEpoch(std::uint64_t epoch, std::int64_t named);
  // What the ranks of this process lend is there for others.
  void NotePublished();
  // What the ranks of another process lend has been seen to be there.
  void NoteSeen(std::int32_t process);
  void NoteBeginning();
  void NoteEnd();

  // A rank is about to be told. The last one's note writes the record: so it is there
  // when all have gone on.
  void NoteTold(bool has_failed);

 private:
  void Write();

  const std::shared_ptr<const Span> span_;
  CallRecord record_ = {};             // without what is known by rank
  std::vector<std::int64_t> came_;     // by rank, like those of records
  std::atomic<std::size_t> num_left_;  // to be told
  std::atomic<bool> is_whole_{true};
};

// What tells a rank, and notes it.
Done Noted(std::shared_ptr<Recording> recording, Done done);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_THREADS_RECORDING_H_
