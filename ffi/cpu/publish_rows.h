// Copies what a rank lends to where ranks of other processes read it. For the fabric of
// processes.

#ifndef JAX_EP_FFI_CPU_PUBLISH_ROWS_H_
#define JAX_EP_FFI_CPU_PUBLISH_ROWS_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "common/work.h"
#include "cpu/plan_fault.h"

namespace jax_ep::cpu {

// Copies the rows of a buffer that other processes read to the same rows of a window.
struct PublishRowsArgs {
  const void* from;          // [num_rows, row_bytes]
  void* to;                  // [num_rows, row_bytes]
  const std::int32_t* rows;  // which, or null: all from the first on
  // Entries of `rows`, [begin, end) each, that are copied.
  std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
  std::int64_t num_rows;
  std::int64_t row_bytes;

  std::int64_t NumEntries() const {
    std::int64_t sum = 0;
    for (const auto& [begin, end] : ranges) sum += end - begin;
    return sum;
  }
};

// Has a publication of all rows leave out those that only ranks of this process pull,
// as the plan says; `is_elsewhere` tells which do not, [num_ranks]. A plan that names
// rows which are none, which is noted, leaves out nothing: peers find theirs all the
// same.
void KeepPulledRows(const std::int32_t* recv_row,     // [num_rows]
                    const std::int32_t* recv_counts,  // [num_ranks]
                    const std::vector<bool>& is_elsewhere, PlanFault* fault,
                    PublishRowsArgs& args);

// Returns the work. `args` is read when it runs and must live until then.
Work PublishRowsWork(const PublishRowsArgs& args);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_PUBLISH_ROWS_H_
