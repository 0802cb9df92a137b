// What one thread of a process tells others that wait for it, with a bound.
// Used by the fabrics of several GPUs.

#ifndef JAX_EP_FFI_FABRIC_GPUS_SIGNAL_H_
#define JAX_EP_FFI_FABRIC_GPUS_SIGNAL_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace jax_ep {

// A number that is set once. Those that wait look for it without pause for as long as a
// peer takes that is on its way, and then sleep.
class Signal {
 public:
  // For another exchange; nobody may be waiting.
  void Clear() { value_.store(0, std::memory_order_relaxed); }

  // Not 0. Releases what this thread has done, for those that see it.
  void Set(std::uint32_t value);

  // Returns the number, or 0 if it was not set in time.
  std::uint32_t Await(std::chrono::steady_clock::time_point deadline) const;

 private:
  std::atomic<std::uint32_t> value_{0};
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_GPUS_SIGNAL_H_
