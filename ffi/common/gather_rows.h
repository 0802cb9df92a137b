// What the CPU's and the GPU's gather_rows are told, and their callers fill in.

#ifndef JAX_EP_FFI_COMMON_GATHER_ROWS_H_
#define JAX_EP_FFI_COMMON_GATHER_ROWS_H_

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/peer_table.h"
#include "common/plan_bounds.h"

namespace jax_ep {

namespace cpu {
class PlanFault;
}

// One rank pulls the tokens of its received choices from their source ranks into its
// rows: `dispatch`, and, scaled by the choices' weights, the gradient of `combine`.
struct GatherRowsArgs {
  PeerTable x;        // [num_tokens, hidden]
  PeerTable weights;  // float32 [num_tokens, num_topk], read only if scaled
  const std::int32_t* recv_choice;  // [capacity], by (source rank, token, k)
  const std::int32_t* recv_row;     // [capacity]
  const std::int32_t* recv_counts;  // [num_ranks], entries of recv_choice in use
  const std::int32_t* group_sizes;  // [num_local_experts]
  const std::int32_t* group_rows;   // [num_local_experts]
  void* rows;                       // [capacity, hidden], or null: in pieces
  std::int64_t num_ranks;
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t num_local_experts;
  std::int64_t capacity;
  std::int64_t hidden;
  std::int64_t row_bytes;
  DType dtype;     // of x and rows; read only if scaled
  bool scaled;     // whether rows are scaled by weights, or plain copies
  bool zero_tail;  // whether to zero the rows past the last group
  cpu::PlanFault* fault = nullptr;  // or null; of use on the CPU alone
  // The other side of the receive lists: where this rank's own tokens go. Or null.
  // Where one kernel fills the rows of all ranks it goes by these, and reads no token
  // twice; where a rank's rows are filled with its own tokens, the receive lists may be
  // null instead.
  const std::int32_t* send_rank = nullptr;  // [num_tokens, num_topk]
  const std::int32_t* send_row = nullptr;   // [num_tokens, num_topk]
  // The rows where they are not all in one place. Of use on the CPU alone.
  void* const* pieces = nullptr;  // each [piece_rows, hidden]
  std::int64_t piece_rows = 0;

  // The arguments of another rank whose operands lie behind this one's.
  EP_HOST_DEVICE GatherRowsArgs OfStacked(std::int64_t i) const {
    GatherRowsArgs args = *this;
    if (!FillsWithOwn()) {
      args.recv_choice += i * capacity;
      args.recv_row += i * capacity;
      args.recv_counts += i * num_ranks;
    }
    args.group_sizes += i * num_local_experts;
    args.group_rows += i * num_local_experts;
    if (send_rank != nullptr) args.send_rank += i * num_tokens * num_topk;
    if (send_row != nullptr) args.send_row += i * num_tokens * num_topk;
    args.rows = static_cast<char*>(rows) + i * capacity * row_bytes;
    return args;
  }

  EP_HOST_DEVICE std::int32_t TokenOf(std::int64_t entry) const {
    return jax_ep::TokenOf(*this, entry);
  }

  // Whether this rank's rows are filled with its own tokens, as the send lists say.
  EP_HOST_DEVICE bool FillsWithOwn() const { return recv_counts == nullptr; }

  EP_HOST_DEVICE std::int64_t NumReceived() const {
    std::int64_t sum = 0;
    for (std::int64_t r = 0; r < num_ranks; ++r) sum += recv_counts[r];
    return sum;
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_GATHER_ROWS_H_
