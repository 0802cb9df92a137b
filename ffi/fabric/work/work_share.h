// How the works of ranks are shared among threads.
// Used by meeting points and channels when all have come, and by ffi/bind/cpu.

#ifndef JAX_EP_FFI_FABRIC_WORK_WORK_SHARE_H_
#define JAX_EP_FFI_FABRIC_WORK_WORK_SHARE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "common/work.h"

namespace jax_ep {

// Hands out the chunks of several ranks' works to whichever threads ask, each once: the
// first of every work, then the second of every work, and so on. Ranks that read the
// same tokens then do so at about the same time, while these are in the cache.
// A rank with much to receive is helped by the others, and the number of threads at
// work is that of those that ask, not of the ranks.
class WorkShare {
 public:
  explicit WorkShare(std::vector<Work> works);

  std::int64_t num_chunks() const { return static_cast<std::int64_t>(order_.size()); }

  bool has_chunks_left() const {
    return next_.load(std::memory_order_relaxed) < num_chunks();
  }

  // Runs chunks until none is left to take, and after each one `after_chunk`. Returns
  // whether it ended the last one, in which case all chunks' effects are visible to the
  // caller.
  bool Drain(const std::function<void()>& after_chunk = [] {});

  // Returns when all chunks have ended. Only chunks that a thread is running are waited
  // for, if the caller has drained the rest.
  void AwaitEnd() const;

 private:
  struct Item {
    std::size_t work;
    std::int64_t chunk;
  };

  std::vector<Work> works_;
  std::vector<Item> order_;
  std::atomic<std::int64_t> next_{0};
  std::atomic<std::int64_t> ended_{0};
};

// Runs tasks on some thread, at some time, or never. Where none is given, a thread does
// what there is to do by itself.
using Schedule = std::function<void(std::function<void()>)>;

std::int64_t NumCores();

// Runs works whose peers are all on this thread's device: no rank is waited for.
// Helpers are scheduled where there are cores for them, and work on other cores than
// this thread. A system that saves itself the search for an idle core in a busy moment
// would have them wait behind it, or take turns with it, while another core has nothing
// to do: for as long as a tick of its scheduler, which is the time of many an exchange.
void RunTogether(std::vector<Work> works, const Schedule& schedule,
                 std::int64_t max_threads = NumCores());

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_WORK_WORK_SHARE_H_
