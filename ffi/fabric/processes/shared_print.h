// What a process tells the others of the call that its ranks make, so that they find
// out if theirs differs. Written and compared by channels, in shared memory.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_SHARED_PRINT_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_SHARED_PRINT_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "fabric/processes/hash.h"
#include "fabric/threads/attendance.h"
#include "fabric/threads/describe.h"

namespace jax_ep {

// A call's print, and what its ranks lend, without pointers and of a fixed size.
struct SharedPrint {
  std::array<char, 40> op;  // all of ours fit; longer names are cut
  std::int64_t rows;
  std::int64_t row_bytes;
  LentSum lent;
  std::uint64_t lent_digest;  // of the size of each buffer
  std::uint32_t plan;
  bool operator==(const SharedPrint&) const = default;
};

inline SharedPrint Share(const CallPrint& print,
                         const std::vector<std::int64_t>& shared_bytes) {
  SharedPrint shared = {.op = {},
                        .rows = print.rows,
                        .row_bytes = print.row_bytes,
                        .lent = SumOf(shared_bytes),
                        .lent_digest = kHashSeed,
                        .plan = print.plan};
  std::strncpy(shared.op.data(), print.op, shared.op.size() - 1);
  for (const std::int64_t bytes : shared_bytes) {
    shared.lent_digest = Mix(shared.lent_digest, bytes);
  }
  return shared;
}

// For errors. What it returns refers to the print.
inline Caller CallerOf(std::string who, const SharedPrint& print) {
  return {.who = std::move(who),
          .print = {.op = print.op.data(),
                    .rows = print.rows,
                    .row_bytes = print.row_bytes,
                    .plan = print.plan},
          .lent = print.lent};
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_SHARED_PRINT_H_
