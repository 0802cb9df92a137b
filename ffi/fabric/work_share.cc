#include "fabric/work_share.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/row_math.h"

namespace jax_ep {
namespace {

constexpr std::int64_t kMaxCalls = 32;

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
  threads_.fetch_add(1, std::memory_order_relaxed);
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

void RunTogether(std::vector<Work> works, const Schedule& schedule) {
  // Helpers may be run after this has returned: they find nothing left to take.
  const auto share = std::make_shared<WorkShare>(std::move(works));
  const std::int64_t wanted = UsefulThreads(share->num_chunks());
  const auto call_helper = [&] { schedule([share] { share->Drain(); }); };
  for (std::int64_t i = 1; i < wanted; ++i) call_helper();
  // A helper that the system has queued behind this very thread does not come while it
  // works, though another core be idle: call again, and another thread is woken there.
  std::int64_t calls_left = kMaxCalls;
  share->Drain([&] {
    if (share->num_threads() < wanted && calls_left-- > 0) call_helper();
  });
  share->AwaitEnd();
}

std::int64_t UsefulThreads(std::int64_t num_chunks) {
  static const std::int64_t cores = std::max(1U, std::thread::hardware_concurrency());
  return std::min(cores, num_chunks);
}

}  // namespace jax_ep
