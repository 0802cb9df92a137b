#ifndef JAX_EP_FFI_COMMON_GATHER_ROWS_H_
#define JAX_EP_FFI_COMMON_GATHER_ROWS_H_

#include <cstdint>

#include "common/dtype.h"

namespace jax_ep {

// One rank pulls the tokens of its received choices from their source ranks into its
// rows: `dispatch`, and, scaled by the choices' weights, the gradient of `combine`.
struct GatherRowsArgs {
  const void* const* x;        // [num_ranks] tables of [num_tokens, hidden]
  const void* const* weights;  // [num_ranks] tables of float32 [num_tokens, num_topk],
                               // read only if scaled
  const std::int32_t* recv_choice;  // [capacity], by (source rank, token, k)
  const std::int32_t* recv_row;     // [capacity]
  const std::int32_t* group_sizes;  // [num_local_experts]
  const std::int32_t* group_rows;   // [num_local_experts]
  void* rows;                       // [capacity, hidden]
  std::int64_t num_received;        // entries of recv_choice and recv_row in use
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t num_local_experts;
  std::int64_t capacity;
  std::int64_t hidden;
  std::int64_t row_bytes;
  DType dtype;     // of x and rows; read only if scaled
  bool scaled;     // whether rows are scaled by weights, or plain copies
  bool zero_tail;  // whether to zero the rows past the last group
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_GATHER_ROWS_H_
