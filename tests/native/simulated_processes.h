// Processes of one job as threads of this one, for the tests of channels.

#ifndef JAX_EP_TESTS_NATIVE_SIMULATED_PROCESSES_H_
#define JAX_EP_TESTS_NATIVE_SIMULATED_PROCESSES_H_

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fabric/processes/channel.h"
#include "fabric/processes/process_words.h"
#include "fabric/threads/meeting.h"
#include "fabric/work/work_share.h"
#include "threads.h"

namespace jax_ep {

// One rank's call of an exchange that spans processes: it lends buffers, whose
// bytes say whose they are, and looks at every byte of everybody's.
struct SpanCall {
  std::int64_t site = 1;
  std::int64_t run_id = 1;
  std::int32_t group = 0;
  CallPrint print = {.op = "dispatch", .rows = 64, .row_bytes = 256, .plan = 7};
  std::int32_t rank = 0;
  std::int64_t turn = 0;  // how often it made this call before
  std::vector<std::int64_t> bytes = {256, 64};
  std::int64_t num_chunks = 2;
};

// What came of it.
struct SpanOutcome {
  std::optional<std::string> failure;
  std::int64_t num_right = 0;  // bytes of all ranks that were as they should be
  std::int64_t num_wrong = 0;
};

// The byte that a rank lends.
char PayloadByte(const SpanCall& call, std::size_t buffer, std::int64_t i);

// A call that somebody waits for. When it has ended what it lent is freed, so that a
// peer that still reads it is caught.
class PendingSpanCall {
 public:
  PendingSpanCall(MeetingPoint& point, std::shared_ptr<const Span> span,
                  const SpanCall& call, const Schedule& schedule);
  bool HasEnded() const;
  const SpanOutcome& Wait() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

// Checks that the call worked, and that it found all bytes of all ranks.
bool CheckWorked(const SpanCall& call, std::size_t num_ranks,
                 const SpanOutcome& outcome);

// Checks that the call failed, before any work, with an error that has all parts in it.
bool CheckFailed(const SpanOutcome& outcome, const std::vector<std::string>& parts);

// What a process shows to the others of one group of ranks, in plain memory: sanitizers
// see what is read before it is published, or filled while it is read. Every filling is
// a new buffer of exact size, and the one before the last is freed by it.
struct Shown {
  char* NewHalf(std::size_t half, std::size_t bytes);

  ProcessWords words{};
  std::array<std::unique_ptr<char[]>, 2> halves;
  std::array<std::size_t, 2> half_bytes{};
  std::atomic<bool> alive{true};
  std::atomic<bool> makes_halves{true};
  std::atomic<bool> shows_halves{true};
};

// As the process itself has it.
std::unique_ptr<Showcase> ShowcaseOf(Shown& shown);

// Processes of one host, as threads of this one. They share nothing but what they show,
// so that nothing else brings their reads and writes into order.
class SimulatedJob {
 public:
  using OnPhase = std::function<void(std::int32_t process, Phase, Epoch)>;

  // Process `played`, if any, has no channels: the test writes its words.
  explicit SimulatedJob(std::int32_t num_processes, OnPhase on_phase = nullptr,
                        std::int32_t played = -1);

  // Makes the channel of one more group of ranks; returns the group's number.
  std::int32_t AddGroup(const std::vector<std::int32_t>& process_of);

  // Lets a rank make a call in its process.
  PendingSpanCall Attend(const SpanCall& call);

  // As Attend, but waits; and checks that it worked.
  bool Works(const SpanCall& call);

  std::size_t num_ranks(std::int32_t group) const;
  Shown& shown(std::int32_t group, std::int32_t process);
  MeetingPoint& point(std::int32_t process);
  // For ranks of the process and for its channels.
  void SetTimeout(std::int32_t process, std::chrono::duration<double> timeout);
  // Ends a process's channels while the others go on.
  void End(std::int32_t process);

 private:
  // In the order in which they need each other.
  struct Process {
    std::atomic<double> timeout{kDefaultWait.count()};
    HelperThreads helpers{2};
    std::vector<std::unique_ptr<Channel>> channels;  // by group
    MeetingPoint point;
  };
  struct Group {
    std::vector<std::int32_t> process_of;
    std::vector<std::unique_ptr<Shown>> shown;  // by process
  };

  Process& process(std::int32_t index) const;
  static Neighbors NeighborsOf(const Group& group, std::int32_t here);

  const OnPhase on_phase_;
  const std::int32_t played_;
  std::vector<std::unique_ptr<Group>> groups_;
  std::vector<std::unique_ptr<Process>> processes_;
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_SIMULATED_PROCESSES_H_
