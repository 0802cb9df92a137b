// What the tests of plans that hold anything have in common.

#ifndef JAX_EP_TESTS_NATIVE_BAD_PLAN_H_
#define JAX_EP_TESTS_NATIVE_BAD_PLAN_H_

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "cpu/plan_fault.h"

namespace jax_ep {

inline constexpr std::int32_t kLowest = std::numeric_limits<std::int32_t>::min();
inline constexpr std::int32_t kHighest = std::numeric_limits<std::int32_t>::max();

// What an index into `size` things may not be: by a little, and by as much as can be.
inline std::vector<std::int32_t> NumbersOutside(std::int64_t size) {
  const auto end = static_cast<std::int32_t>(size);
  return {kLowest, -end - 1, -2, -1, end, end + 1, kHighest};
}

// Checks that the fault names this field, or that there is none.
inline bool CheckFault(const cpu::PlanFault& fault, std::string_view field) {
  const std::string_view what = fault.what() == nullptr ? "" : fault.what();
  return EP_CHECK_EQ(std::string(what.substr(0, what.find(' '))), std::string(field));
}

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_BAD_PLAN_H_
