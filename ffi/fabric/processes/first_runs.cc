// Implements first_runs.h: a thread that looks at the boards until all have come.

#include "fabric/processes/first_runs.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fabric/threads/call_log.h"
#include "fabric/threads/describe.h"

namespace jax_ep {
namespace {

// How often the boards are looked at while a first run waits. First runs are few, and
// follow a compilation, beside which this is nothing.
constexpr std::chrono::milliseconds kPoll{1};

// Logs that a rank came, and when it is told. The processes have no number of this call
// in common yet: the log has this process's.
FirstRuns::Told LogFirstRun(const FirstRun& run, std::int32_t here,
                            FirstRuns::Told told) {
  const auto log = std::make_shared<LoggedCall>(
      "rank " + std::to_string(run.rank) + " of " +
          std::to_string(run.process_of.size()) + " in process " + std::to_string(here),
      "the first run of " + run.call,
      "run " + std::to_string(run.run_id) + ", call " + std::to_string(run.site) +
          " of this process");
  return [log, told = std::move(told)](const FirstRuns::Outcome& outcome) {
    log->NoteEnd(outcome.failure);
    told(outcome);
  };
}

}  // namespace

// The ranks that have done so less often than this one.
std::vector<std::int32_t> FirstRuns::Behind(const Pending& pending, Count count) {
  const FirstRun& run = pending.run;
  std::vector<std::int32_t> behind;
  for (std::size_t i = 0; i < run.process_of.size(); ++i) {
    const auto rank = static_cast<std::int32_t>(i);
    const auto* theirs = pending.host->FirstRunsOf(run.process_of[i], run.group, rank);
    const std::int32_t done =
        theirs == nullptr ? 0 : (theirs->*count).load(std::memory_order_relaxed);
    if (done < pending.turn) behind.push_back(rank);
  }
  return behind;
}

bool FirstRuns::AreAlive(const Pending& pending,
                         const std::vector<std::int32_t>& ranks) {
  return std::ranges::all_of(ranks, [&](std::int32_t rank) {
    const auto process = pending.run.process_of[static_cast<std::size_t>(rank)];
    return pending.host->IsAlive(process);
  });
}

FirstRuns::~FirstRuns() {
  {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (watcher_.joinable()) watcher_.join();
}

void FirstRuns::Await(Host& host, FirstRun run, Told told) {
  if (LogsCalls()) told = LogFirstRun(run, host.here(), std::move(told));
  Board::FirstRunsOfRank* own = host.OwnFirstRuns(run.group, run.rank);
  if (own == nullptr) {
    told({.failure = run.call + ": this process has ranks in too many groups"});
    return;
  }
  const auto timeout = timeout_();
  const std::scoped_lock lock(mutex_);
  pending_.push_back(
      {.host = &host,
       .run = std::move(run),
       .told = std::move(told),
       .own = own,
       .turn = own->begun.fetch_add(1, std::memory_order_relaxed) + 1,
       .deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                      std::min(timeout, kLongestWait)),
       .timeout = timeout});
  if (!watcher_.joinable()) watcher_ = std::thread([this] { Watch(); });
  changed_.notify_all();
}

void FirstRuns::Remember(const FirstRun& run, AgreedCall call) {
  const std::scoped_lock lock(mutex_);
  std::vector<Known>& known = known_[run.group];
  const bool is_new = std::ranges::none_of(
      known, [&](const Known& k) { return k.call.number == call.number; });
  if (is_new) known.push_back({.kind = run.kind, .call = call});
}

std::optional<AgreedCall> FirstRuns::Find(std::int64_t group, std::int64_t number) {
  const std::scoped_lock lock(mutex_);
  for (const Known& known : known_[group]) {
    if (known.call.number == number) return known.call;
  }
  return std::nullopt;
}

void FirstRuns::Watch() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (pending_.empty()) {
      changed_.wait(lock);
      continue;
    }
    std::vector<std::pair<Told, Outcome>> over;
    for (auto it = pending_.begin(); it != pending_.end();) {
      const std::optional<Outcome> outcome = Look(*it);
      if (!outcome) {
        ++it;
        continue;
      }
      if (outcome->known || outcome->failure) TakeBack(*it);
      over.emplace_back(std::move(it->told), *outcome);
      it = pending_.erase(it);
    }
    lock.unlock();
    // Each goes on with its rank's program, up to where that waits for other ranks.
    for (auto& [told, outcome] : over) std::thread(std::move(told), outcome).detach();
    lock.lock();
    changed_.wait_for(lock, kPoll);
  }
}

// What turned out to be no first run, or failed, does not count.
void FirstRuns::TakeBack(const Pending& pending) {
  if (pending.met) pending.own->met.fetch_sub(1, std::memory_order_relaxed);
  pending.own->begun.fetch_sub(1, std::memory_order_relaxed);
  for (Pending& other : pending_) {
    if (other.own == pending.own && other.turn > pending.turn) --other.turn;
  }
}

// A rank that has begun may give up, and another that has seen it begin would go on
// alone. So ranks also say that they have seen all others: none of those gives up.
std::optional<FirstRuns::Outcome> FirstRuns::Look(Pending& pending) {
  if (pending.met) return LookWhetherAllMet(pending);
  const auto missing = Behind(pending, &Board::FirstRunsOfRank::begun);
  if (missing.empty()) {
    pending.met = true;
    pending.own->met.fetch_add(1, std::memory_order_relaxed);
    pending.deadline += std::chrono::duration_cast<Clock::duration>(
        std::min(pending.timeout, kLongestWait));
    return std::nullopt;
  }
  if (auto known = CallOfOthers(pending)) return Outcome{.known = known};
  if (AreAlive(pending, missing) && Clock::now() < pending.deadline)
    return std::nullopt;
  return Fail(pending, missing);
}

// Those that have not met this one yet either will, soon, or had given up before.
std::optional<FirstRuns::Outcome> FirstRuns::LookWhetherAllMet(const Pending& pending) {
  const auto missing = Behind(pending, &Board::FirstRunsOfRank::met);
  if (missing.empty()) return Outcome{};
  const auto gave_up = Behind(pending, &Board::FirstRunsOfRank::begun);
  const bool go_on = gave_up.empty() && AreAlive(pending, missing);
  if (go_on && Clock::now() < pending.deadline) return std::nullopt;
  return Fail(pending, gave_up.empty() ? missing : gave_up);
}

// The call of this kind in which another process waits, in the very execution that this
// run is of a program compiled again: it has the same number of runs behind it.
std::optional<AgreedCall> FirstRuns::CallOfOthers(const Pending& pending) {
  if (IsAmbiguous(pending)) return std::nullopt;
  const FirstRun& run = pending.run;
  for (const Known& known : known_[run.group]) {
    // What was agreed on in this very run is another call of it.
    if (known.kind != run.kind || known.call.first_run == run.run_id) continue;
    const ExchangeName name = {.site = known.call.number,
                               .execution = run.run_id - known.call.first_run};
    const bool is_awaited =
        std::ranges::any_of(run.process_of, [&](std::int32_t process) {
          return pending.host->IsIn(process, run.process_of, run.group, name);
        });
    if (is_awaited) return known.call;
  }
  return std::nullopt;
}

// Two calls of one kind in one program cannot be told apart from here.
bool FirstRuns::IsAmbiguous(const Pending& pending) const {
  const auto same = [&](const Pending& other) {
    return other.run.kind == pending.run.kind && other.run.group == pending.run.group &&
           other.run.site != pending.run.site;
  };
  if (std::ranges::any_of(pending_, same)) return true;
  const auto found = known_.find(pending.run.group);
  if (found == known_.end()) return false;
  std::vector<std::int64_t> runs;
  for (const Known& known : found->second) {
    if (known.kind == pending.run.kind) runs.push_back(known.call.first_run);
  }
  std::ranges::sort(runs);
  return std::ranges::adjacent_find(runs) != runs.end();
}

// A rank beside this one may have given up for the same reason a moment ago: those of
// other processes are named before those of its own.
FirstRuns::Outcome FirstRuns::Fail(const Pending& pending,
                                   const std::vector<std::int32_t>& behind) {
  const FirstRun& run = pending.run;
  const auto process_of = [&](std::int32_t rank) {
    return run.process_of[static_cast<std::size_t>(rank)];
  };
  std::vector<std::int32_t> missing;
  std::ranges::copy_if(behind, std::back_inserter(missing), [&](std::int32_t rank) {
    return process_of(rank) != process_of(run.rank);
  });
  if (missing.empty()) missing = behind;
  std::string processes;
  std::int32_t last = -1;
  for (const std::int32_t rank : missing) {
    if (process_of(rank) == last) continue;
    last = process_of(rank);
    processes += (processes.empty() ? " of process " : ", ") + std::to_string(last);
  }
  const bool ended = !AreAlive(pending, missing);
  return {.failure = run.call + ": rank " + std::to_string(run.rank) + " of " +
                     std::to_string(run.process_of.size()) +
                     " gave up, because it runs this call for the first time since it "
                     "was compiled, and " +
                     RankList(missing) + processes +
                     (ended ? " had ended" : " did not do so within ") +
                     (ended ? "" : Seconds(pending.timeout))};
}

}  // namespace jax_ep
