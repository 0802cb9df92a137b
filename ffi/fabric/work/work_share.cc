// Implements work_share.h.

#include "fabric/work/work_share.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "fabric/work/cores.h"
#include "fabric/work/ieee.h"

namespace jax_ep {
namespace {

// How long a helper may take to come; waking a thread takes a few 10 µs.
constexpr std::chrono::microseconds kPatience{60};

// Sees to it that a thread and its helpers work on different cores. Of two that find
// themselves on one core only one goes, or they would meet again on the other.
class Cores {
 public:
  // For the thread itself, when it misses its helpers: one may be queued behind it.
  void LeaveUnlessHelped() {
    {
      const std::scoped_lock lock(mutex_);
      if (helped_) return;
      core_ = kMoving;
    }
    LeaveCore();
    const std::scoped_lock lock(mutex_);
    core_ = ThisCore();
  }

  // For helpers.
  void LeaveToHelped() {
    {
      const std::scoped_lock lock(mutex_);
      helped_ = true;
      if (core_ != ThisCore()) return;
    }
    LeaveCore();
  }

 private:
  static constexpr int kMoving = -2;  // no thread's core

  std::mutex mutex_;
  int core_ = ThisCore();  // that the thread works on
  bool helped_ = false;
};

// Works that a thread shares with its helpers.
struct Together {
  explicit Together(std::vector<Work> works) : share(std::move(works)) {}
  WorkShare share;
  Cores cores;
};

void Help(Together& together) {
  if (!together.share.has_chunks_left()) return;
  together.cores.LeaveToHelped();
  // Again, as the system may move the threads at any time; not for ever, as it may be
  // right to do so.
  int moves_left = 3;
  together.share.Drain([&] {
    if (moves_left-- > 0) together.cores.LeaveToHelped();
  });
}

}  // namespace

WorkShare::WorkShare(std::vector<Work> works) : works_(std::move(works)) {
  std::int64_t total = 0;
  for (const Work& work : works_) total += work.num_chunks;
  order_.reserve(static_cast<std::size_t>(total));
  for (std::int64_t chunk = 0; num_chunks() < total; ++chunk) {
    for (std::size_t i = 0; i < works_.size(); ++i) {
      if (chunk < works_[i].num_chunks) order_.push_back({.work = i, .chunk = chunk});
    }
  }
}

bool WorkShare::Drain(const std::function<void()>& after_chunk) {
  const ScopedIeee ieee;
  bool ended_last = false;
  for (;;) {
    // Relaxed: taking a chunk orders nothing, the works were published before.
    const std::int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= num_chunks()) break;
    const Item item = order_[static_cast<std::size_t>(chunk)];
    works_[item.work].run(works_[item.work].args, item.chunk);
    // Releases this chunk's writes; whoever reads the full count acquires all of them.
    ended_last = ended_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_chunks();
    after_chunk();
  }
  if (ended_last) ended_.notify_all();
  return ended_last;
}

void WorkShare::AwaitEnd() const {
  std::int64_t ended = ended_.load(std::memory_order_acquire);
  while (ended != num_chunks()) {
    ended_.wait(ended, std::memory_order_acquire);
    ended = ended_.load(std::memory_order_acquire);
  }
}

void RunTogether(std::vector<Work> works, const Schedule& schedule,
                 std::int64_t max_threads) {
  // Helpers may be run after this has returned: they find nothing left to take.
  const auto together = std::make_shared<Together>(std::move(works));
  WorkShare& share = together->share;
  const std::int64_t wanted = schedule ? std::min(max_threads, share.num_chunks()) : 1;
  for (std::int64_t i = 1; i < wanted; ++i) schedule([together] { Help(*together); });
  using Clock = std::chrono::steady_clock;
  bool waits_for_help = wanted > 1;
  const Clock::time_point patient_until = Clock::now() + kPatience;
  share.Drain([&] {
    if (!waits_for_help || Clock::now() < patient_until) return;
    waits_for_help = false;
    together->cores.LeaveUnlessHelped();
  });
  share.AwaitEnd();
}

std::int64_t NumCores() {
  static const std::int64_t cores = std::max(1U, std::thread::hardware_concurrency());
  return cores;
}

}  // namespace jax_ep
