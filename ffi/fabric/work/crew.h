// Threads of our own. Used by hosts, whose channels run work on them.

#ifndef JAX_EP_FFI_FABRIC_WORK_CREW_H_
#define JAX_EP_FFI_FABRIC_WORK_CREW_H_

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace jax_ep {

// Threads of our own, for what goes on when no thread of XLA's is lent to us. A task is
// never kept waiting by others that block: there are as many threads as have ever been
// needed at once.
class Crew {
 public:
  Crew() = default;
  ~Crew();  // when all tasks have ended
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  void Schedule(std::function<void()> task);

 private:
  void Serve();

  std::mutex mutex_;  // guards all below
  std::condition_variable wanted_;
  std::deque<std::function<void()>> tasks_;
  std::size_t num_idle_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_WORK_CREW_H_
