// What the CPU's and the GPU's reduce_rows are told, and how the two must round.

#ifndef JAX_EP_FFI_COMMON_REDUCE_ROWS_H_
#define JAX_EP_FFI_COMMON_REDUCE_ROWS_H_

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/peer_table.h"

namespace jax_ep {

namespace cpu {
class PlanFault;
}

// What a rank pulls from one on which a token has choices.
enum class Pulled : std::uint8_t {
  kRows,           // a row for each
  kSumsOfSeveral,  // the partial sum of several; if it is one, its row
  kSums,           // a partial sum in any case
};

// One rank pulls its tokens' rows from the ranks of their experts and adds them up:
// `combine`, and, with unit weights, the gradient of `dispatch`.
//
// How sums round is the same on every machine, to the last bit. For each rank, in
// ascending order, a partial sum starts at zero and goes by fma(weight, row, sum) in
// ascending k. It is rounded to dtype, as if it crossed a wire. The partial sums of a
// node's ranks are added up in the same order, and rounded to dtype; then those of the
// nodes likewise, at the end. A node of one rank adds nothing, so that its partial sum
// counts as it is. All sums are in float32, of float64 in float64; all rounding is to
// nearest, ties to even.
struct ReduceRowsArgs {
  PeerTable rows;                 // [capacity, hidden]
  const float* weights;           // [num_tokens, num_topk], or null: all ones
  const std::int32_t* send_rank;  // [num_tokens, num_topk], where the row is
  const std::int32_t* send_row;   // [num_tokens, num_topk], kDropped: leave out
  void* out;                      // [num_tokens, hidden]
  std::int64_t num_ranks;
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t capacity;
  std::int64_t hidden;
  DType dtype;                      // of rows and out
  cpu::PlanFault* fault = nullptr;  // or null; of use on the CPU alone
  // Other than kRows on a GPU alone.
  Pulled pulled = Pulled::kRows;
  // The partial sums of all ranks, which stand where partial_sums.h says. As those need
  // not name them that pull rows: NOLINTNEXTLINE(readability-redundant-member-init)
  PeerTable partials = PeerTable();
  std::int64_t ranks_per_node = 1;  // a node's are one after the other
  std::int64_t first_token = 0;     // the rank's first one's number among those of all

  // The arguments of another rank whose operands lie behind this one's.
  EP_HOST_DEVICE ReduceRowsArgs OfStacked(std::int64_t i) const {
    ReduceRowsArgs args = *this;
    if (weights != nullptr) args.weights += i * num_tokens * num_topk;
    args.send_rank += i * num_tokens * num_topk;
    args.send_row += i * num_tokens * num_topk;
    args.out = static_cast<char*>(out) + i * num_tokens * hidden * ByteWidth(dtype);
    args.first_token += i * num_tokens;
    return args;
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_REDUCE_ROWS_H_
