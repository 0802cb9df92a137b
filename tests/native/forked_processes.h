// Hosts in processes of their own, which a test forks and lets exchange with it.
// Used by tests of hosts.

#ifndef JAX_EP_TESTS_NATIVE_FORKED_PROCESSES_H_
#define JAX_EP_TESTS_NATIVE_FORKED_PROCESSES_H_

#include <sys/resource.h>
#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "fabric/processes/host.h"
#include "fabric/threads/meeting.h"
#include "simulated_processes.h"
#include "threads.h"

namespace jax_ep {

// The end of a process is noticed long before this has passed, and an answer comes.
inline constexpr std::chrono::duration<double> kLong{60};
inline constexpr std::chrono::duration<double> kSoon{1};

// Two processes of one rank each.
inline const std::vector<std::int32_t> kOneEach = {0, 1};

std::unique_ptr<Host> NewHost(std::int32_t here = 0,
                              std::chrono::duration<double> timeout = kLong,
                              bool is_ordered = false);

// One process's side: its host and where its ranks meet.
class Side {
 public:
  Side(std::int32_t here, std::chrono::duration<double> timeout,
       bool is_ordered = false);

  Host& host() { return *host_; }
  MeetingPoint& point() { return point_; }
  BoardAddress address() const { return host_->address(); }

  // Makes the call of all of this process's ranks from `first` on; returns what came of
  // the first one's.
  SpanOutcome Make(SpanCall call, const std::vector<std::int32_t>& process_of,
                   std::size_t first = 0);

  // As Make, turn after turn, until one fails; returns that one, or the last.
  SpanOutcome MakeTurns(const std::vector<std::int32_t>& process_of,
                        std::int64_t turns);

  std::shared_ptr<const Span> SpanOf(const std::vector<std::int32_t>& process_of,
                                     std::int32_t group);

 private:
  const std::int32_t here_;
  HelperThreads helpers_{2};
  std::unique_ptr<Host> host_;
  MeetingPoint point_;
};

// A process of its own that runs `body(side)` once both know each other's boards.
class Child {
 public:
  using Body = std::function<bool(Side&)>;

  // To be made while this process has no other threads.
  Child(std::int32_t here, std::chrono::duration<double> timeout, const Body& body,
        bool is_ordered = false);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  // Tells this process's host and the child's of each other, each first told by its own
  // process.
  void Join(Side& own, std::int32_t here);

  pid_t process() const { return process_; }
  void Signal(int signal) const;
  // Waits for its end; returns whether its body said that all was well.
  bool Ended();

 private:
  pid_t process_ = -1;
  int to_ = -1;
  int from_ = -1;
};

// Lets this process have no more than so many files open while it lives.
class FileLimit {
 public:
  explicit FileLimit(rlim_t most);
  ~FileLimit();
  FileLimit(const FileLimit&) = delete;
  FileLimit& operator=(const FileLimit&) = delete;

 private:
  rlimit before_{};
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_FORKED_PROCESSES_H_
