// The words in which errors speak of ranks and calls. Used by all that makes ranks wait
// for each other, in one process and between several.

#ifndef JAX_EP_FFI_FABRIC_THREADS_DESCRIBE_H_
#define JAX_EP_FFI_FABRIC_THREADS_DESCRIBE_H_

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "fabric/threads/attendance.h"

namespace jax_ep {

// "rank 1", "ranks 1, 2"
std::string RankList(const std::vector<std::int32_t>& ranks);

// "1.5 s"
std::string Seconds(std::chrono::duration<double> duration);

// "dispatch of [64 rows, 256 bytes] with plan fingerprint 7"
std::string Describe(const CallPrint& print);

// What a rank lends, as far as it can be told in a few numbers.
struct LentSum {
  std::int64_t num_buffers;
  std::int64_t shared_bytes;  // of all of them
  bool operator==(const LentSum&) const = default;
};

LentSum SumOf(const std::vector<std::int64_t>& shared_bytes);

// Who called what.
struct Caller {
  std::string who;  // "rank 2"
  CallPrint print;
  LentSum lent;
};

// "rank 2 called dispatch of … and rank 3 called combine of …", for two calls that
// differ in print or, if not, in the buffers that a rank lends.
std::string DescribeMismatch(const Caller& one, const Caller& other);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_THREADS_DESCRIBE_H_
