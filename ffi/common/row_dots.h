#ifndef JAX_EP_FFI_COMMON_ROW_DOTS_H_
#define JAX_EP_FFI_COMMON_ROW_DOTS_H_

#include <cstdint>

#include "common/dtype.h"

namespace jax_ep {

// One rank pulls its tokens' rows from the ranks of their experts and multiplies each
// with the token's row of `dout`: the gradient of `combine` in its weights.
struct RowDotsArgs {
  const void* const* rows;       // [num_ranks] tables of [capacity, hidden]
  const void* dout;              // [num_tokens, hidden]
  const std::int32_t* topk_idx;  // [num_tokens, num_topk]
  const std::int32_t* send_row;  // [num_tokens, num_topk], kDropped: zero
  float* dots;                   // [num_tokens, num_topk]
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t num_local_experts;
  std::int64_t hidden;
  DType dtype;  // of rows and dout
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_ROW_DOTS_H_
