// How ranks in several processes run a call together for the first time.
// Used by ffi/bind/cpu when such ranks agree on a call's number.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_FIRST_RUNS_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_FIRST_RUNS_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fabric/processes/host.h"

namespace jax_ep {

// A rank's call, in a group of ranks in several processes.
struct FirstRun {
  std::string call;         // for errors
  std::uint64_t kind = 0;   // of the call: what is equal in all processes
  std::int64_t group = 0;   // of ranks
  std::int64_t run_id = 0;  // XLA's number of the run, of use in this process only
  std::int64_t site = 0;    // the custom call's number in this process
  std::int32_t rank = 0;
  std::vector<std::int32_t> process_of;  // by rank
};

// A call that a group of ranks has agreed on: the number that its first rank's process
// has for it, and the run in which they did so. Its n-th execution is that of run
// first_run + n: XLA counts the runs of a program, each process from a number of its
// own.
struct AgreedCall {
  std::int64_t number;
  std::int64_t first_run;
};

// Sees to it that ranks who run a call for the first time do so together, before they
// agree on its number by a collective that waits without a bound. If some of them have
// run it before, and wait for this process in a call of the same kind, they and this
// process have agreed on it: it has merely compiled its program again.
class FirstRuns {
 public:
  // Told once: that all are new to the call (null), which call they are in already, or
  // why neither is known in time.
  struct Outcome {
    std::optional<AgreedCall> known = std::nullopt;
    std::optional<std::string> failure = std::nullopt;
  };
  using Told = std::function<void(const Outcome&)>;
  using Timeout = std::function<std::chrono::duration<double>()>;

  explicit FirstRuns(Timeout timeout) : timeout_(std::move(timeout)) {}
  ~FirstRuns();
  FirstRuns(const FirstRuns&) = delete;
  FirstRuns& operator=(const FirstRuns&) = delete;

  // Returns at once; `told` is called from another thread.
  void Await(Host& host, FirstRun run, Told told);

  // To be called when a group has agreed on a call, and to find it again.
  void Remember(const FirstRun& run, AgreedCall call);
  std::optional<AgreedCall> Find(std::int64_t group, std::int64_t number);

 private:
  struct Pending {
    Host* host;
    FirstRun run;
    Told told;
    Board::FirstRunsOfRank* own;
    std::int32_t turn;  // of this rank's first runs in its group
    Clock::time_point deadline;
    std::chrono::duration<double> timeout;
    bool met = false;
  };
  struct Known {
    std::uint64_t kind;
    AgreedCall call;
  };

  using Count = std::atomic<std::int32_t> Board::FirstRunsOfRank::*;

  static std::vector<std::int32_t> Behind(const Pending& pending, Count count);
  static bool AreAlive(const Pending& pending, const std::vector<std::int32_t>& ranks);
  void Watch();
  void TakeBack(const Pending& pending);
  std::optional<Outcome> Look(Pending& pending);
  std::optional<Outcome> LookWhetherAllMet(const Pending& pending);
  std::optional<AgreedCall> CallOfOthers(const Pending& pending);
  bool IsAmbiguous(const Pending& pending) const;
  static Outcome Fail(const Pending& pending, const std::vector<std::int32_t>& behind);

  const Timeout timeout_;
  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::list<Pending> pending_;
  std::map<std::int64_t, std::vector<Known>> known_;  // by group
  bool stopping_ = false;
  std::thread watcher_;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_FIRST_RUNS_H_
