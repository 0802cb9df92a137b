// What the CPU's and the GPU's row_dots are told, and their callers fill in.

#ifndef JAX_EP_FFI_COMMON_ROW_DOTS_H_
#define JAX_EP_FFI_COMMON_ROW_DOTS_H_

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/peer_table.h"

namespace jax_ep {

namespace cpu {
class PlanFault;
}

// One rank pulls its tokens' rows from the ranks of their experts and multiplies each
// with the token's row of `dout`: the gradient of `combine` in its weights.
struct RowDotsArgs {
  PeerTable rows;                 // [capacity, hidden]
  const void* dout;               // [num_tokens, hidden]
  const std::int32_t* send_rank;  // [num_tokens, num_topk], where the row is
  const std::int32_t* send_row;   // [num_tokens, num_topk], kDropped: zero
  float* dots;                    // [num_tokens, num_topk]
  std::int64_t num_ranks;
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t capacity;
  std::int64_t hidden;
  DType dtype;                      // of rows and dout
  cpu::PlanFault* fault = nullptr;  // or null; of use on the CPU alone

  // The arguments of another rank whose operands lie behind this one's.
  EP_HOST_DEVICE RowDotsArgs OfStacked(std::int64_t i) const {
    RowDotsArgs args = *this;
    args.dout =
        static_cast<const char*>(dout) + i * num_tokens * hidden * ByteWidth(dtype);
    args.send_rank += i * num_tokens * num_topk;
    args.send_row += i * num_tokens * num_topk;
    args.dots += i * num_tokens * num_topk;
    return args;
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_ROW_DOTS_H_
