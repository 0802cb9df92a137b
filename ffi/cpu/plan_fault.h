// How the CPU's kernels report a plan that is not as it was made, for the handlers to
// fail the call.

#ifndef JAX_EP_FFI_CPU_PLAN_FAULT_H_
#define JAX_EP_FFI_CPU_PLAN_FAULT_H_

#include <atomic>
#include <cstdint>

#include "common/dropped.h"
#include "common/plan_bounds.h"

namespace jax_ep::cpu {

// What a call's plan was first found to hold that no plan of make_plan's does. Any
// thread may note it; to be read when all of the call's work has ended.
class PlanFault {
 public:
  // `what` begins with the field's name, and lives for ever.
  void Note(const char* what) {
    const char* nothing = nullptr;
    what_.compare_exchange_strong(nothing, what, std::memory_order_relaxed);
  }

  // Null if the plan was good.
  const char* what() const { return what_.load(std::memory_order_relaxed); }

 private:
  std::atomic<const char*> what_{nullptr};
};

// For kernels, whose callers need not want to know.
inline void NoteFault(PlanFault* fault, const char* what) {
  if (fault != nullptr) fault->Note(what);
}

inline constexpr char kBadRecvCounts[] =
    "recv_counts holds a negative number, or adds up to more than capacity";
inline constexpr char kBadRecvRow[] = "recv_row holds a row outside [0, capacity)";

// Whether `count` numbers are those of different rows out of `capacity`.
inline bool AreCounts(const std::int32_t* numbers, std::int64_t count,
                      std::int64_t capacity) {
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (numbers[i] < 0) return false;
    sum += numbers[i];
  }
  return sum <= capacity;
}

// Says why a choice has no row, unless it was dropped.
template <typename Args>
void NoteMissingRow(const Args& args, std::int64_t choice) {
  const std::int32_t row = args.send_row[choice];
  if (row == kDropped) return;
  NoteFault(args.fault, IsIndex(row, args.capacity)
                            ? "send_rank holds a rank outside [0, num_ranks) for a "
                              "choice that has a row"
                            : "send_row holds a row outside [0, capacity)");
}

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_PLAN_FAULT_H_
