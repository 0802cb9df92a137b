// What happened in the latest exchanges, and when: a ring of records that nobody waits
// for. Written by whoever tells a rank as the last one; Python switches and reads it.

#ifndef JAX_EP_FFI_FABRIC_THREADS_RECORDER_H_
#define JAX_EP_FFI_FABRIC_THREADS_RECORDER_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace jax_ep {

// Whether calls that begin now are recorded; off until set. Relaxed: it orders nothing.
inline std::atomic<bool> records_calls{false};
inline bool RecordsCalls() { return records_calls.load(std::memory_order_relaxed); }

// Returns whether they were until now.
inline bool SetRecordsCalls(bool enabled) {
  return records_calls.exchange(enabled, std::memory_order_relaxed);
}

// Nanoseconds of the steady clock, which all processes of a host have in common.
std::int64_t SteadyNow();

// How many ranks one record tells of.
inline constexpr std::size_t kRecordedRanks = 64;

// An exchange, as one process saw it, which had no failure. That of more ranks than
// fit has several, which differ in `first_rank` and what belongs to it: so records are
// of one size, and an exchange of few ranks is whole wherever its record is. All are
// 8 bytes wide, for jax_ep/_record.py to read. Times are those of SteadyNow, 0 where
// there is none.
struct CallRecord {
  std::int64_t exchange;   // its number in this process
  const char* op;          // the public function; like all texts here never freed
  const char* scope;       // the layer's name in the program
  const char* fabric;      // who met
  std::int64_t run;        // one execution of one program
  std::int64_t call_site;  // one custom call in it
  std::int64_t group;      // between processes: which ranks, the same in all of them
  std::int64_t epoch;      // between processes: its number in all of them; else 0
  std::int64_t num_ranks;
  std::int64_t lent_bytes;  // by each rank, for its peers to read
  std::int64_t named;      // between processes: when the leader had named it, to others
  std::int64_t published;  // between processes: when what its ranks lend was there
  std::int64_t began;      // when all had come, and the works began
  std::int64_t ended;      // when the works had ended
  std::int64_t told;       // when the last rank of this process was told
  std::int64_t first_rank;
  std::uint64_t is_here;  // by rank from that one on, from the lowest bit on
  // By rank, likewise: when it came, if it is here; else when its process was seen to
  // have published.
  std::array<std::int64_t, kRecordedRanks> came;
};
static_assert(sizeof(void*) == 8 && sizeof(CallRecord) == 8 * (17 + kRecordedRanks));

// The ring. Any number of threads write, and none waits: a record goes over the oldest
// one, or is lost if that one's writer has not ended. Who reads gets whole records.
class Recorder {
 public:
  explicit Recorder(std::size_t capacity);

  void Write(const CallRecord& record);

  // How many records there were until now, lost ones too.
  std::uint64_t count() const { return next_.load(std::memory_order_acquire); }

  // Copies those of the records from number `from` on, as many as there is room for,
  // that are there and whole, in order; returns how many these are.
  std::size_t Read(std::uint64_t from, std::span<CallRecord> room) const;

 private:
  static constexpr std::size_t kWords = sizeof(CallRecord) / sizeof(std::uint64_t);

  // A record in its place. While number n is written the stamp is 2n + 1, and then
  // 2n + 2. Words are stored with release and loaded with acquire: a reader that sees
  // a word of a later record sees that record's stamp afterwards.
  struct Slot {
    std::atomic<std::uint64_t> stamp{0};
    std::array<std::atomic<std::uint64_t>, kWords> words{};
  };

  const Slot& SlotOf(std::uint64_t number) const { return slots_[number % capacity_]; }
  Slot& SlotOf(std::uint64_t number) { return slots_[number % capacity_]; }

  const std::size_t capacity_;
  const std::unique_ptr<Slot[]> slots_;
  std::atomic<std::uint64_t> next_{0};
};

// This process's, which comes to be when it is first asked for.
Recorder& ProcessRecorder();

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_THREADS_RECORDER_H_
