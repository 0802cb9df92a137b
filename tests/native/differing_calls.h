// Calls that differ from the tests' usual one in one thing each, for the tests of ranks
// that call different things.

#ifndef JAX_EP_TESTS_NATIVE_DIFFERING_CALLS_H_
#define JAX_EP_TESTS_NATIVE_DIFFERING_CALLS_H_

#include <string>
#include <vector>

#include "fabric/threads/attendance.h"

namespace jax_ep {

// In the words of errors: what the tests' ranks call, and each of the others.
inline constexpr char kUsualCall[] =
    "dispatch of [64 rows, 256 bytes] with plan fingerprint 7";

struct DifferingCall {
  CallPrint print;
  std::string described;
};

inline std::vector<DifferingCall> DifferingCalls() {
  return {{{.op = "combine", .rows = 64, .row_bytes = 256, .plan = 7},
           "combine of [64 rows, 256 bytes] with plan fingerprint 7"},
          {{.op = "dispatch", .rows = 65, .row_bytes = 256, .plan = 7},
           "dispatch of [65 rows, 256 bytes] with plan fingerprint 7"},
          {{.op = "dispatch", .rows = 64, .row_bytes = 255, .plan = 7},
           "dispatch of [64 rows, 255 bytes] with plan fingerprint 7"},
          {{.op = "dispatch", .rows = 64, .row_bytes = 256, .plan = 4000000000},
           "dispatch of [64 rows, 256 bytes] with plan fingerprint 4000000000"}};
}

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_DIFFERING_CALLS_H_
