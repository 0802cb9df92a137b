// Threads for tests: several side by side, some late, some that help.

#ifndef JAX_EP_TESTS_NATIVE_THREADS_H_
#define JAX_EP_TESTS_NATIVE_THREADS_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "fabric/work/work_share.h"

namespace jax_ep {

// Runs body(0) … body(count - 1), each on a thread of its own; returns when all ended.
void OnThreads(std::int64_t count, const std::function<void(std::int64_t)>& body);

// Goes on at once, lets others run first, or sleeps for up to a few 100 µs.
void Dawdle(std::mt19937_64& rng);

// Threads that run the tasks they are given: sooner or later, in no particular order,
// but all of them before it dies.
class HelperThreads {
 public:
  explicit HelperThreads(std::int64_t num_threads = 3);
  HelperThreads(const HelperThreads&) = delete;
  HelperThreads& operator=(const HelperThreads&) = delete;
  ~HelperThreads();

  Schedule schedule();
  std::int64_t num_scheduled();

 private:
  void Add(std::function<void()> task);
  void Run(std::uint64_t seed);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::function<void()>> tasks_;
  std::int64_t num_scheduled_ = 0;
  bool ending_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_THREADS_H_
